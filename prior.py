"""A prior over code maps: a decoder-only transformer over the indices in raster order.

It is trained after the VQ-VAE, which stays frozen (van den Oord et al. 2017, section 3.3; a PixelCNN there).
Letters: B maps, h×w codes of one map, T = h·w of them in raster order, K codes, E the transformer's width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

TAIL_FROM = -5.5        # codes with a log-probability below it are the tail
TAIL_KNOTS = 12         # of its calibration, at the log-probabilities TAIL_FROM − 1, TAIL_FROM − 2, …
BLOCK_LOGITS = 2**22    # held in memory at once in evaluation mode: 16 MiB of float32, whatever K and T


class GatedMLP(nn.Module):
    """An MLP of which each hidden value is multiplied by another one's SiLU: SwiGLU (Shazeer 2020, equation 6).

    About as many weights as in a plain MLP with 4·E hidden values: (..., E) → (..., E).
    """

    def __init__(self, embedding):
        super().__init__()
        hidden = 16 * max(1, round(8 * embedding / 3 / 16))             # multiples of 16 are computed fastest
        self.values_gates = nn.Linear(embedding, 2 * hidden)
        self.project = nn.Linear(hidden, embedding)

    def forward(self, x):
        values, gates = self.values_gates(x).chunk(2, dim=-1)
        return self.project(values * F.silu(gates))


class Block(nn.Module):
    """Causal self-attention and an MLP, each on normalised inputs and with a skip: (B, T, E) → (B, T, E)."""

    def __init__(self, embedding, heads, dropout, gated):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(embedding), nn.LayerNorm(embedding)
        self.queries_keys_values = nn.Linear(embedding, 3 * embedding)
        self.project = nn.Linear(embedding, embedding)
        self.perceptron = GatedMLP(embedding) if gated else nn.Sequential(
            nn.Linear(embedding, 4 * embedding), nn.SiLU(), nn.Linear(4 * embedding, embedding))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cache=None, position=None):
        """x (B, T, E) → (B, T, E). With a cache, keys and values (2, B, heads, T, E/heads), x is (B, 1, E): its own are
        written into the cache at the position, and it attends to all up to there.
        """
        B, T, E = x.shape
        heads = self.queries_keys_values(self.attention_norm(x)).view(B, T, 3, self.heads, E // self.heads)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            heads = heads.float()       # the backward pass of attention in bfloat16 is eight times slower there
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)          # each (B, heads, T, E/heads)
        if cache is not None:
            cache[0, :, :, position], cache[1, :, :, position] = keys[:, :, 0], values[:, :, 0]
            keys, values = cache[:, :, :, :position + 1]
        # With a cache there is one new position, which attends to all earlier ones. No T×T scores are held in memory.
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=T > 1)
        x = x + self.drop(self.project(attended.transpose(1, 2).reshape(B, T, E)))
        return x + self.drop(self.perceptron(self.perceptron_norm(x)))


class CodePrior(nn.Module):
    """p(code map | class) and p(code map) in one model, as a product over codes in raster order.

    height and width are h and w of a map, embedding is E, the --width of train_prior.py. Position t sees the class, or
    that there is none, and the codes before t. In training a class is dropped with probability drop_label, so that one
    model learns both distributions (classifier-free guidance, Ho and Salimans 2022). Maps of shifted images may be
    trained on as well: every position also sees which of num_shifts it is, 0 for the image as it is, so that the shifts
    teach which codes go together and are never sampled (distribution augmentation, Jun et al. 2020). gated: whether
    the MLPs are gated, as train_prior.py has them; the first priors had plain ones. Raises ValueError if a size is
    below 1, heads do not divide the width, dropout is not in [0, 1), or drop_label not in [0, 1].
    """

    def __init__(self, num_codes, height, width, num_classes=10, layers=4, embedding=128, heads=4,
                 dropout=0.1, drop_label=0.1, num_shifts=1, gated=False):
        super().__init__()
        if min(num_codes, height, width, num_classes, num_shifts, layers, embedding, heads) < 1 or embedding % heads:
            raise ValueError(f"a prior of {num_codes} codes on {height}×{width} maps with {num_classes} classes, "
                             f"{layers} layers, width {embedding} and {heads} heads: sizes are "
                             "positive integers, and the heads divide the width")
        if not (0 <= dropout < 1 and 0 <= drop_label <= 1):
            raise ValueError(f"dropout is in [0, 1) and drop_label in [0, 1], not {dropout} and {drop_label}")
        self.num_codes, self.height, self.width = num_codes, height, width
        self.num_classes, self.drop_label = num_classes, drop_label
        self.label_embedding = nn.Embedding(num_classes + 1, embedding)     # the last one means no class
        self.shift_embedding = nn.Embedding(num_shifts, embedding)
        self.code_embedding = nn.Embedding(num_codes, embedding)
        self.positions = nn.Parameter(torch.zeros(height * width, embedding))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(embedding, heads, dropout, gated) for _ in range(layers))
        self.norm = nn.LayerNorm(embedding)
        self.head = nn.Linear(embedding, num_codes)
        # Added to the logits, linearly between the knots; the first number, 0, to those above the tail.
        self.register_buffer("tail", torch.zeros(1 + TAIL_KNOTS))
        self.apply(self._init)
        nn.init.normal_(self.positions, std=0.02)

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, indices, labels=None, shifts=None):
        """Logits (B, T, K) of each code of the maps (B, h, w) given the codes before it, its class and its shift (B,).

        labels None means no class, shifts None no shift. Raises ValueError if maps or labels do not fit.
        """
        return self._logits(self._hidden(indices, labels, shifts))

    def logits_at(self, indices, position, labels=None):
        """The logits (B, K) of forward() at one position alone, in raster order: those of all take T times as much."""
        return self._logits(self._hidden(indices, labels, None)[:, position])

    def _hidden(self, indices, labels, shifts):
        """(B, T, E), of which the logits are a linear function."""
        labels = self._labels(labels, len(indices))
        if self.training:
            labels = labels.masked_fill(_uniform_like(labels) < self.drop_label, self.num_classes)
        flat = self._flat(indices)                                    # (B, T)
        previous = F.pad(self.code_embedding(flat[:, :-1]), (0, 0, 1, 0))               # (B, T, E), 0 at the start
        x = self.drop(previous + self._condition(labels, shifts).unsqueeze(1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _logits(self, hidden):
        logits = self.head(hidden).float()
        return logits if self.training else self._calibrated(logits)

    def _blocks_of_rows(self, hidden, indices):
        """Pairs of hidden rows (n, E) and their codes (n,), of all positions of all maps; in training mode one pair."""
        hidden, codes = hidden.flatten(0, 1), self._flat(indices).flatten()           # (B·T, E), (B·T,)
        block = len(hidden) if self.training else max(1, BLOCK_LOGITS // self.num_codes)
        return zip(hidden.split(block), codes.split(block))

    def log_prob(self, indices, labels=None, shifts=None):
        """log p(map | label), or log p(map) without labels, in nats: (B,) for maps (B, h, w).

        shifts (B,), or None for none. In training mode labels are dropped at random. Raises ValueError as forward().
        """
        hidden = self._hidden(indices, labels, shifts)                # (B, T, E)
        losses = [F.cross_entropy(self._logits(rows), codes, reduction="none")
                  for rows, codes in self._blocks_of_rows(hidden, indices)]
        return -torch.cat(losses).view(len(indices), -1).sum(dim=1)

    @torch.no_grad()
    def sample(self, labels, temperature=1.0, top_k=None, guidance=1.0, generator=None, given=None):
        """Code maps (B, h, w) sampled one code after the other for labels (B,); class num_classes means none.

        temperature divides the logits; top_k keeps only the most probable codes; guidance 1 samples p(map | label), a
        larger one moves away from p(map). given (B, n) are the first n codes of each map, which are kept. generator is
        one of the CPU, or None for torch's: the samples are the same on every device up to rounding, and in whatever
        batches they are drawn. Runs in evaluation mode, and restores the mode. Raises ValueError for a label or code
        out of range, temperature ≤ 0, top_k < 1, or weights that give no probabilities.
        """
        codes = list(self.sample_in_order(labels, temperature, top_k, guidance, generator, given))
        return torch.stack(codes, dim=1).view(len(labels), self.height, self.width)

    @torch.no_grad()
    def sample_in_order(self, labels, temperature=1.0, top_k=None, guidance=1.0, generator=None, given=None):
        """The same as sample(), but yields the codes (B,) of one position after the other, in raster order."""
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} is not above 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k {top_k} is not a positive integer")
        labels, given = self._labels(labels, len(labels)), self._given(given, len(labels))
        was_training = self.training
        self.eval()
        B, guided = len(labels), guidance != 1
        if guided:      # the same maps a second time, without their class
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        condition = self._condition(labels)                           # (B or 2B, E)
        (T, E), heads = self.positions.shape, self.blocks[0].heads
        caches = condition.new_empty(len(self.blocks), 2, len(labels), heads, T, E // heads)
        x = torch.zeros_like(condition)
        # All random numbers at once: drawn code by code, a GPU would be waited for at every code.
        draws = torch.rand(B, T, generator=generator).to(x.device).T                  # (T, B)
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        try:
            for position, embedding in enumerate(self.positions):
                x = (x + condition + embedding).unsqueeze(1)          # (B or 2B, 1, E)
                for block, cache in zip(self.blocks, caches):
                    x = block(x, cache, position)
                if position < given.shape[1]:
                    codes = given[:, position]                        # (B,)
                else:
                    logits = self._logits(self.norm(x).squeeze(1))    # (B or 2B, K)
                    if guided:
                        logits = torch.lerp(logits[B:], logits[:B], guidance)
                    logits = logits / temperature
                    finite &= logits.isfinite().all()
                    codes = sample_codes(logits, draws[position], top_k)
                yield codes
                x = self.code_embedding(codes).repeat(2 if guided else 1, 1)
            if not finite:
                raise ValueError("the prior's probabilities are not finite: it is damaged")
        finally:
            self.train(was_training)

    @torch.no_grad()
    def calibrate(self, maps, labels, batch_size=100):
        """Fit the probabilities of improbable codes to maps (N, h, w) and labels (N,), batch_size of them at a time.

        A softmax over hundreds of codes gives the improbable ones too much probability in total. The loss hardly
        changes, but a single such code spoils a sample. So the probabilities around each knot of the tail are scaled to
        the frequency of the codes that have them (histogram binning, Zadrozny and Elkan 2001), each code counting for
        the two knots that it lies between, and the logits are changed linearly from knot to knot: rounding then changes
        a probability by rounding alone. In training mode the logits are left as they are.
        """
        was_training = self.training
        self.eval()
        self.tail.zero_()
        expected, observed = torch.zeros(2, len(self.tail), dtype=torch.float64)
        for map_batch, label_batch in zip(maps.split(batch_size), labels.split(batch_size)):
            hidden = self._hidden(map_batch, label_batch, None)       # (B, T, E)
            for rows, codes in self._blocks_of_rows(hidden, map_batch):
                logits = self._logits(rows)                           # (n, K)
                knots, shares = self._knots(logits)                   # (n, K)
                codes = codes.unsqueeze(1)
                expected += self._per_knot(knots, shares, logits.softmax(dim=1))
                observed += self._per_knot(knots.gather(1, codes), shares.gather(1, codes), torch.ones_like(codes))
        self.tail[1:] = ((observed + 0.5) / (expected + 0.5)).log()[1:].to(self.tail)
        self.train(was_training)

    @staticmethod
    def _knots(logits):
        """For each code of logits (..., K) the knot before it, up to TAIL_KNOTS − 1, and the share of the next one."""
        position = (TAIL_FROM - logits.log_softmax(dim=-1)).clamp(0, TAIL_KNOTS)
        knots = position.long().clamp(0, TAIL_KNOTS - 1)          # also where a logit is not a number
        return knots, position - knots

    def _per_knot(self, knots, shares, weights):
        """The sum of weights at each knot, each divided between the two that it lies between, in float64 on the CPU."""
        sums = torch.zeros(1 + TAIL_KNOTS, device=weights.device)
        sums.index_add_(0, knots.flatten(), ((1 - shares) * weights).flatten())
        sums.index_add_(0, 1 + knots.flatten(), (shares * weights).flatten())
        return sums.cpu().double()

    def _calibrated(self, logits):
        knots, shares = self._knots(logits)
        tail = self.tail.to(logits)
        return logits + torch.lerp(tail[knots], tail[knots + 1], shares)

    def _condition(self, labels, shifts=None):
        shifts = torch.zeros_like(labels) if shifts is None else shifts.to(labels.device)
        return self.label_embedding(labels) + self.shift_embedding(shifts)            # (B, E)

    def _labels(self, labels, count):
        if labels is None:
            return torch.full((count,), self.num_classes, device=self.positions.device)
        if labels.shape != (count,) or not self._in_range(labels, self.num_classes + 1):
            raise ValueError(f"labels are ({count},) integers from 0 to {self.num_classes}, the last for none")
        return labels.to(self.positions.device)

    def _given(self, given, count):
        if given is None:
            return torch.empty(count, 0, dtype=torch.int64)
        if given.dim() != 2 or len(given) != count or given.shape[1] > len(self.positions) or given.is_floating_point():
            raise ValueError(f"given {given.dtype} {tuple(given.shape)} is not integers ({count}, 0 to "
                             f"{len(self.positions)})")
        self._check_codes(given)
        return given.to(self.positions.device).long()

    def _check_codes(self, codes):
        if not self._in_range(codes, self.num_codes):
            raise ValueError(f"codes {codes.min()} to {codes.max()} leave [0, {self.num_codes})")

    def _flat(self, indices):
        if indices.dim() != 3 or indices.shape[1:] != (self.height, self.width):
            raise ValueError(f"code maps {tuple(indices.shape)} are not (B, {self.height}, {self.width})")
        self._check_codes(indices)
        return indices.to(self.positions.device).flatten(1).long()

    def _in_range(self, values, size):
        """Whether integers are in [0, size); those of a training step on a GPU are taken to be, or it would wait.

        Nor are they read in a compiled graph, which that would break.
        """
        if torch.compiler.is_compiling() or (self.training and values.device.type != "cpu") or not values.numel():
            return True
        return 0 <= int(values.min()) <= int(values.max()) < size       # as Python integers: a uint8 tensor has no 256


def sample_codes(logits, draws, top_k=None):
    """A code for each row of logits (B, K), sampled by inverting its cumulative distribution at draws (B,) in [0, 1).

    That is the first code at which the cumulative probability, in the order of the codes, exceeds the number: (B,).
    Only the top_k most probable codes are drawn, if given. Logits that are not finite give any code.
    """
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    device = "cpu" if logits.device.type == "mps" else logits.device                # MPS has no float64
    cumulative = logits.to(device, torch.float64).softmax(dim=1).cumsum(dim=1)      # (B, K)
    heights = draws.float().to(device).unsqueeze(1) * cumulative[:, -1:]            # (B, 1), float64, below the sum
    codes = torch.searchsorted(cumulative, heights, right=True).squeeze(1)
    return codes.clamp(max=logits.shape[1] - 1).to(logits.device)


def _uniform_like(labels):
    """A random number in [0, 1) for each of labels (B,).

    With several processes, each draws for the whole batch and takes its shard, so that all generators stay in step.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.rand(len(labels), device=labels.device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return torch.rand(len(labels) * world_size, device=labels.device)[rank::world_size]
