// A pad to draw on with mouse, pen or finger. Sends the strokes when the pen is lifted: lists of [x, y] in [0, 1].
const canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
let strokes = [], drawing = false;

function position(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function paint() {
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.strokeStyle = context.fillStyle = "white";
    context.lineWidth = canvas.width / 14;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of strokes) {
        context.beginPath();
        for (const [x, y] of [stroke[0], ...stroke]) context.lineTo(x * canvas.width, y * canvas.height);
        context.stroke();
    }
}

function lift() {
    if (drawing) trigger("input", {strokes});
    drawing = false;
}

canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drawing = true;
    strokes.push([position(event)]);
    paint();
});
canvas.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    strokes.at(-1).push(position(event));
    paint();
});
canvas.addEventListener("pointerup", lift);
canvas.addEventListener("pointercancel", lift);

function clear() {
    strokes = [];
    paint();
}

element.querySelector("button").addEventListener("click", clear);
canvas.addEventListener("clear", clear);        // sent when another picture is chosen
