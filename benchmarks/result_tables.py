"""The tables and sentences of the documents that show measured figures, as templates.

A field {row:figure:form} is a figure of docs/results/ROW.json. The form is one of Python's for the mean over the seeds;
±form adds the standard deviation. {row} is the command of a row. How they are filled in is in documents.py.
"""

from typing import NamedTuple

from result_rows import CODEBOOKS, QUANTIZERS, ROWS, SETTINGS, THREE_EPOCHS


class Table(NamedTuple):
    """A table of a page, found by the heading above it and its header row."""

    page: str
    heading: str
    header: str
    lines: list                 # templates of the rows


class Sentence(NamedTuple):
    """A sentence, or a line of model.txt, with figures; it may be wrapped differently in the page."""

    page: str
    text: str                   # a template


def trained(row, form="", bold=""):
    """The three figures of a training, as cells. form: "±" for mean and standard deviation."""
    return (f"{bold}{{{row}:mse:{form}.4f}}{bold} | {{{row}:perplexity:{form}.0f}} | "
            f"{bold}{{{row}:used:{form}.0f}}{bold} |")


def codebook(init, restart, update):
    row = f"codebook {init} {restart} {update}"
    return f"{{{row}:mse:.4f}} ({{{row}:perplexity:.0f}}, {{{row}:used:.0f}})"


def sampled(row, flags):
    return (f"| {flags} | {{{row}:recognised samples:.2%}} ± {{{row}:error recognised samples:.2%}} | "
            f"{{{row}:frechet samples:.2f}} |")


def judged(judge=""):
    """Lines on all images of the row "shipped", by the classifier of that name: shares with their standard errors."""
    lines = []
    for title, name in (("**samples of the prior**", "samples"), ("test set, reconstructed", "reconstructions"),
                        ("noise, quantized and decoded, as `--input random` does it", "noise"),
                        ("test set", "test set")):
        shares = [f"{{shipped:{figure} {name}{judge}:.2%}} ± {{shipped:error {figure} {name}{judge}:.2%}}"
                  for figure in ("recognised", "precision", "recall")]
        if name == "test set":
            shares[1:] = "100 %", "100 %"
        lines.append(f"| {title} | {shares[0]} | {{shipped:frechet {name}{judge}:.2f}} | {shares[1]} | {shares[2]} |")
    return lines


def quantizer(name):
    """A line on one quantizer of the row "quantizers"."""
    def figure(kind, form):
        return f"{{quantizers:{kind} {name}:{form}}}"

    cells = [figure("rate", "g"), figure("compared_mse", "±.4f"), figure("compared_perplexity", "±.0f"),
             figure("compared_used", "±.0f"), figure("compared_nats", ".1f"), figure("compared_bits", ".3f"),
             figure("ms", ".0f")]
    return f"| {name} | {' | '.join(cells)} |"


SETTINGS_HEADER = "| settings | command | test MSE | perplexity | codes used |"
SAMPLED = [row.name for row in ROWS if row.group == "samples" and row.name.startswith(("temperature", "guidance"))]

TABLES = [
    Table("README.md", "VQ-VAE on MNIST, in PyTorch",
          "| full MNIST, ten epochs (recommended: twelve) | test MSE on [−1, 1] | perplexity | codes used, of 512 |", [
              f"| published settings, published codebook (uniform start, no restarts) | {trained('published')}",
              f"| published settings, this codebook (K-means start, restarts) | {trained('defaults')}",
              f"| **recommended settings, this codebook** | {trained('recommended', bold='**')}"]),
    Table("README.md", "Shipped models", "| file | contents | results on MNIST's 10,000 test digits |", [
        "| `pretrained/vqvae.pt` (0.7 MB) | VQ-VAE with the recommended settings, D 40, K 512 | "
        "MSE {shipped:mse:.5f}, PSNR {shipped:psnr:.2f} dB, perplexity {shipped:perplexity:.1f}, {shipped:used:.0f} "
        "codes used, {shipped:bits:.4f} bits per dimension |",
        "| `pretrained/prior.pt` (8.0 MB) | its prior, a transformer of 4 blocks, width 192, 6 heads | "
        "{shipped:nats:.3f} nats per code, {shipped:bits prior:.3f} bits per dimension; "
        "{shipped:recognised samples:.2%} ± {shipped:error recognised samples:.2%} of 10,000 samples recognised, "
        "Fréchet distance {shipped:frechet samples:.2f} in the classifier's features |",
        "| `pretrained/classifier.pt`, `classifier-transformer.pt` (0.6 MB each) | the classifiers used to score "
        "samples | {shipped:recognised test set:.2%} and {shipped:recognised test set by the transformer:.2%} "
        "accuracy |",
        "| `pretrained/vqvae-cifar10.pt` (1.4 MB) | VQ-VAE for [colour "
        "photographs](docs/own-images.md#photographs-cifar-10) of 32×32 pixels | CIFAR-10 instead: "
        "MSE {CIFAR-10 shipped:mse:.4f}, PSNR {CIFAR-10 shipped:psnr:.1f} dB, {CIFAR-10 shipped:used:.0f} codes used "
        "|"]),
    Table("README.md", "Results", SETTINGS_HEADER, [
        f"| published, published codebook | `{{published}}` | {trained('published', '±')}",
        f"| published, this codebook | `{{defaults}}` | {trained('defaults', '±')}",
        f"| the same with EMA | `{{EMA}}` | {trained('EMA', '±')}",
        f"| lowest loss | `{{lowest loss}}` | {trained('lowest loss', '±')}",
        f"| **recommended** | under [Train](#train-sample-use-your-own-images) | {trained('recommended', '±')}",
        f"| quick start, on its 1,000 test digits | under [Quick start](#quick-start) | {trained('MNIST-10k', '±')}"]),

    Table("docs/results.md", "Results", SETTINGS_HEADER, [
        f"| published settings, published codebook | `{{published}}` | {trained('published', '±')}",
        f"| published settings, this codebook | `{{defaults}}` | {trained('defaults', '±')}",
        f"| the same with moving averages | `{{EMA}}` | {trained('EMA', '±')}",
        f"| lowest loss | `{{lowest loss}}` | {trained('lowest loss', '±')}",
        f"| **recommended** | `{{recommended}}` | {trained('recommended', '±')}"]),
    Table("docs/results.md", "The bundled digits", SETTINGS_HEADER, [
        f"| those of `make` | `{{MNIST-10k}}` | {trained('MNIST-10k', '±')}",
        f"| published codebook, all images | `{{uniform}}` | {trained('uniform', '±')}"]),
    Table("docs/results.md", "The codebook: each choice alone and together",
          "| | `--codebook-update gradient` | `--codebook-update ema` |", [
              f"| `--codebook-init {init} --restart-after {restart}` | {codebook(init, restart, 'gradient')} | "
              f"{codebook(init, restart, 'ema')} |" for init, restart, update in CODEBOOKS if update == "ema"]),
    Table("docs/results.md", "Effect of each setting", "| flag | test MSE | perplexity | codes used |", [
        f"| `--{flag} {value}` | " + trained("three epochs" if value == THREE_EPOCHS[flag] else f"{flag} {value}")
        for flag, values in SETTINGS.items() for value in sorted((*values, THREE_EPOCHS[flag]))]),
    Table("docs/results.md", "Effect of each setting",
          "| epoch | training MSE | test MSE | perplexity | codes used |", [
              f"| {epoch} | {{thirty epochs:training epoch {epoch}:.4f}} | {{thirty epochs:mse epoch {epoch}:.4f}} | "
              f"{{thirty epochs:perplexity epoch {epoch}:.0f}} | {{thirty epochs:used epoch {epoch}:.0f}} |"
              for epoch in (10, 20, 30)]),

    Table("docs/sampling.md", "How good the digits are",
          "| 10,000 images each | recognised by the CNN | Fréchet distance | precision | recall |", judged()),
    Table("docs/sampling.md", "How good the digits are",
          "| the same images | by the vision transformer | Fréchet distance | precision | recall |",
          judged(" by the transformer")),
    Table("docs/sampling.md", "Are they copies?", "| 2,000 images each | median ratio | counted as copies |", [
        *(f"| {title} | {{shipped:ratio {name}:.3f}} | {{shipped:copies {name}:.2%}} ± "
          f"{{shipped:error copies {name}:.2%}} |" for title, name in (
              ("**samples of the prior**", "samples"), ("test set, reconstructed", "reconstructions"),
              ("training images moved by a pixel, with noise", "planted"),
              ("these, reconstructed by the VQ-VAE", "planted reconstructed"))),
        "| test set | {shipped:ratio test set:.3f} | {shipped:copies test set:.2%}, by definition |"]),
    Table("docs/sampling.md", "Temperature and guidance",
          "| flags | recognised by the CNN | Fréchet distance in its features |", [
              sampled("shipped", "none: temperature 1, guidance 1"),
              *(sampled(row, f"`--{row}`") for row in SAMPLED)]),
    Table("docs/sampling.md", "Complete an image", "| rows kept | read as the true digit |", [
        f"| {kept} of 7 | {{completions:read {kept} rows:.1%}} ± {{completions:error {kept} rows:.1%}} |"
        for kept in range(8)]),

    Table("docs/quantizers.md", "Quantizers side by side",
          "| quantizer | rate | test MSE | perplexity | codes used | nats per map | bits per dimension | ms per step |",
          [quantizer(name) for name in QUANTIZERS]),

    Table("docs/own-images.md", "Photographs: CIFAR-10", "| on the 10,000 test images | |", [
        "| MSE, reconstruction | {CIFAR-10 pipeline:mse:.4f} on the [−1, 1] scale, PSNR "
        "{CIFAR-10 pipeline:psnr:.1f} dB |",
        "| codebook and commitment loss | {CIFAR-10 pipeline:codebook:.4f} each |",
        "| codes | {CIFAR-10 pipeline:used:.0f} of 512 used, perplexity {CIFAR-10 pipeline:perplexity:.0f} |",
        "| bits per dimension | {CIFAR-10 pipeline:bits:.4f} for the codes as they are, "
        "{CIFAR-10 pipeline:bits prior:.4f} under the prior |",
        "| prior | {CIFAR-10 pipeline:nats:.3f} nats per code, of at most log 512 = 6.24 |",
        "| time | 38 minutes for the VQ-VAE and 45 for the prior, with one thread of an AMD EPYC with AVX-512 |"]),
]

SENTENCES = [
    Sentence("README.md", "A classifier with a test accuracy of {shipped:recognised test set:.2%} recognises "
                          "{shipped:recognised samples:.2%} ± {shipped:error recognised samples:.2%} of the digits "
                          "sampled"),
    Sentence("README.md", "This reaches a test MSE of {recommended:mse:.4f} with {recommended:used:.0f} codes in use"),
    Sentence("docs/training.md", "The test loss is {recommended:mse epoch 1:.3f} after the first epoch and "
                                 "{recommended:mse:.4f} after the twelfth (means of three seeds)."),
    Sentence("docs/results.md", "With its settings and its codebook the run here ends at {published:mse:.4f} "
                                "(first row)."),
    Sentence("docs/results.md", "The recommended run ends at a validation loss of {recommended:validation:.4f} (mean "
                                "of three seeds)."),
    Sentence("docs/results.md", "these end at {three epochs EMA:mse:.4f}, without `ema` at {three epochs:mse:.4f}."),
    Sentence("docs/questions.md", "the published codebook ends at a perplexity of {published:perplexity:.0f} with "
                                  "{published:used:.0f} codes used."),
    Sentence("docs/questions.md", "The shipped model uses {shipped:used:.0f} of 512 codes at a perplexity of "
                                  "{shipped:perplexity:.0f}."),
    Sentence("docs/questions.md", "Of 10,000 such images, {shipped:recognised noise:.2%} are recognised"),
    Sentence("docs/questions.md", "after three epochs of the published settings, "
                                  "{codebook uniform 0 gradient:used:.0f} codes are in use with neither, "
                                  "{codebook kmeans 0 gradient:used:.0f} with K-means, "
                                  "{codebook uniform 20 gradient:used:.0f} with restarts but at a high loss, "
                                  "{codebook kmeans 20 gradient:used:.0f} with both"),
    Sentence("docs/sampling.md", "The shipped prior has {shipped:nats:.3f} nats per code on the test set, where a "
                                 "uniform distribution over the codes has log 512 = 6.24; that is "
                                 "{shipped:bits prior:.3f} bits per dimension."),
    Sentence("docs/sampling.md", "recognise {shipped:recognised test set:.2%} and "
                                 "{shipped:recognised test set by the transformer:.2%} of the test set."),
    Sentence("docs/quantizers.md", "Its codes cost the prior {quantizers:compared_nats FSQ:.0f} nats, those of VQ by "
                                   "gradient {quantizers:compared_nats VQ, gradient:.0f}."),
    Sentence("docs/quantizers.md", "Without restarts {quantizers:compared_used without restarts:.0f} codes are left "
                                   "and the MSE is {quantizers:compared_mse without restarts:.4f}; without K-means all "
                                   "{quantizers:compared_used without K-means:.0f} are used, and it is "
                                   "{quantizers:compared_mse without K-means:.4f}; with both, "
                                   "{quantizers:compared_mse VQ, gradient:.4f}."),
    Sentence("docs/quantizers.md", "keeps {quantizers:compared_used published codebook:±.0f} codes here"),
    Sentence("docs/quantizers.md", "MSEs of {quantizers:compared_mse VQ, cosine similarity:.4f} and "
                                   "{quantizers:compared_mse BSQ:.4f}, for "
                                   "{quantizers:compared_nats VQ, cosine similarity:.0f} and "
                                   "{quantizers:compared_nats BSQ:.0f} nats."),
    Sentence("model.txt", "precision {shipped:precision samples:.2%} ± {shipped:error precision samples:.2%}, recall "
                          "{shipped:recall samples:.2%} ± {shipped:error recall samples:.2%}, in the features of the "
                          "first classifier copies {shipped:copies samples:.2%} ± {shipped:error copies samples:.2%} "
                          "of 2,000 digits drawn"),
    Sentence("model.txt", "as python3 evaluate.py prints them: test MSE {shipped:mse:.5f} on the [-1, 1] scale PSNR "
                          "{shipped:psnr:.2f} dB perplexity {shipped:perplexity:.1f} codes used {shipped:used:.0f} of "
                          "512 bits per dimension {shipped:bits:.4f}"),
    Sentence("model.txt", "nats per code {shipped:nats:.4f} on the 10,000 test digits bits per dimension "
                          "{shipped:bits prior:.4f} recognised {shipped:recognised samples:.2%} ± "
                          "{shipped:error recognised samples:.2%} of 10,000 digits drawn Fréchet distance "
                          "{shipped:frechet samples:.2f}"),
    Sentence("model.txt", "in 19 minutes versions as above, one thread seed 0 accuracy {classifier:accuracy:.2%} "
                          "of the 10,000 test digits"),
    Sentence("model.txt", "in 49 minutes versions as above, one thread seed 0 accuracy "
                          "{classifier transformer:accuracy:.2%} of the 10,000 test digits"),
    Sentence("model.txt", "folder cifar10 is: test MSE {CIFAR-10 shipped:mse:.5f} on the [-1, 1] scale PSNR "
                          "{CIFAR-10 shipped:psnr:.2f} dB perplexity {CIFAR-10 shipped:perplexity:.1f} codes used "
                          "{CIFAR-10 shipped:used:.0f} of 512 bits per dimension {CIFAR-10 shipped:bits:.4f}"),
]
