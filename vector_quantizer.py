"""Quantizers. Vector quantization: the nearest code to every latent, the straight-through gradient, and the codebook.

Letters: B images, h×w latents of one image, N = B·h·w latents in all, D latent size, K codes.
The paper is van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv:1711.00937.

A quantizer is an nn.Module, made as cls(num_codes, dim, **settings) and named in QUANTIZERS. It has

    num_codes, dim      integers, K and D
    forward(z_e)        latents (B, D, h, w) → Quantized, of which z_q has a gradient with respect to z_e
    encode(z_e)         the indices (B, h, w) int64 of the same latents
    lookup(indices)     the codes (B, D, h, w) of indices (B, h, w) int64 in [0, K): forward's z_q, up to rounding
    restarts            optional: how many codes were moved, an int64 scalar; a buffer with persistent=False, changed in
                        place. The training logs it, saves it, and sets it to zero before each epoch

State that has to survive is in parameters and buffers. In evaluation mode none of it changes, and no random number is
drawn. Nothing else of a quantizer is used outside of this file, but for the names of its settings, by VQ-VAE.py; of
VectorQuantizer its state, by checkpoint.py for bare state_dicts; and the operation vector_quantizer::nearest, by
export.py. The quantizers of this file also take latents of another rank than 4, as (..., D) with indices (...); those
of rank 4 are always (B, D, h, w).
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# Latent-code scores held in memory at once: 4 MiB of float32, which stay in a CPU's cache; 256 MiB on other devices,
# where the time of starting an operation counts.
BLOCK_SCORES = {"cpu": 2**20}
BLOCK_SCORES_ELSEWHERE = 2**26
REGISTER = 16               # float32 numbers in the widest register of a CPU
KMEANS_ITERATIONS = 10
EMA_DECAY = 0.99            # γ of appendix A.1
LAPLACE = 1e-5              # ε of the smoothed cluster sizes; not in the paper, but in Sonnet's VectorQuantizerEMA

INTEGERS = torch.uint8, torch.int16, torch.int32, torch.int64       # types of indices
CODEBOOK_UPDATES = ("gradient", "ema")
CODEBOOK_INITS = ("kmeans", "uniform")
MAX_FSQ_CODES = 2**20
MAX_FSQ_LEVELS = 1000       # the bound leaves a thousandth free: more would not all be reached


class Quantized(NamedTuple):
    """What a quantizer returns for z_e (B, D, h, w); both losses are unweighted scalars, zero where it has none."""

    z_q: torch.Tensor               # (B, D, h, w), codes; their gradient goes to z_e
    indices: torch.Tensor           # (B, h, w) int64, in [0, K)
    codebook_loss: torch.Tensor     # eq. 3, second term, as a mean over elements
    commitment_loss: torch.Tensor   # eq. 3, third term without β, as a mean over elements


@torch.no_grad()
def vq(inputs, codebook):
    """The index of the nearest code to each vector: argmin_k ‖z − e_k‖ (eq. 1).

    inputs (..., D) and codebook (K, D), floating point → int64 (...), in [0, K). The lowest index wins a tie. Not
    differentiable. In plain PyTorch it is torch.cdist(inputs, codebook).argmin(-1); this is faster, and holds the
    distances of a block of rows instead of all N × K. Computed in float32, under autocast too.

    Raises ValueError if the last sizes differ or the codebook is not a (K, D) matrix with K > 0.
    """
    if codebook.dim() != 2 or len(codebook) == 0 or inputs.shape[-1:] != codebook.shape[1:]:
        raise ValueError(f"inputs {tuple(inputs.shape)} and codebook {tuple(codebook.shape)} "
                         "do not fit: expected (..., D) and (K, D) with K > 0")
    flat = inputs.reshape(-1, inputs.shape[-1])                       # (N, D)
    search = _nearest_op if torch.compiler.is_compiling() else _nearest
    return search(flat, codebook).view(inputs.shape[:-1])


def _nearest(flat: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index (N,) of the nearest of K codes to each of N vectors."""
    with torch.autocast(flat.device.type, enabled=False):
        K, flat = len(codebook), flat.float()
        offset = _shared_offset(flat)
        codes = codebook.float() - offset                             # (K, D)
        # argmin ‖z − e‖² = argmin ‖e‖² − 2 z·e, as one product of (z, 1) and (−2e, ‖e‖²): adding ‖e‖² afterwards would
        # take another pass over all the scores.
        weights = torch.cat([-2 * codes, codes.square().sum(dim=1, keepdim=True)], dim=1)             # (K, D + 1)
        # Padded to whole registers: a product's last columns may round differently from the others, and then equal
        # codes would not tie.
        weights = F.pad(weights, (0, 0, 0, -K % REGISTER)).T          # (D + 1, K + padding)
        block_scores = BLOCK_SCORES.get(flat.device.type, BLOCK_SCORES_ELSEWHERE)
        block = max(1, min(len(flat), block_scores // weights.shape[1]))              # rows
        augmented, scores = flat.new_ones(block, len(weights)), flat.new_empty(block, weights.shape[1])
        nearest = []
        for rows in flat.split(block):
            n = len(rows)
            augmented[:n, :-1] = rows - offset                        # (z, 1)
            torch.mm(augmented[:n], weights, out=scores[:n])
            # min(), not argmin(): it returns the first index as well, and is more than twice as fast on a CPU.
            nearest.append(scores[:n, :K].min(dim=1).indices)
    return torch.cat(nearest)


# The same as one operation of a compiled graph, which would otherwise hold every block.
_nearest_op = torch.library.custom_op("vector_quantizer::nearest", _nearest, mutates_args=())
_nearest_op.register_fake(lambda flat, codebook: flat.new_empty(flat.shape[0], dtype=torch.int64))


def _shared_offset(latents):
    """A vector (D,) near the mean of the latents (N, D), to subtract from latents and codes alike.

    Distances do not change, but ‖e‖² − 2 z·e cancels badly in float32 when the latents share a large offset. The result
    is a multiple of a power of two no smaller than the latents' spread: zero for latents around the origin, whatever
    the batch, and subtracting it does not round away an exact tie. Of many latents 256 are sampled, a large prime
    apart: a stride that divides h·w would sample the same position of every image.
    """
    sample = latents
    if len(latents) > 256:
        sample = latents[torch.arange(256, device=latents.device) * 7919 % len(latents)]
    deviation, mean = torch.std_mean(sample, dim=0, correction=0)
    spread = 8 * deviation.max().clamp(min=1e-30)
    step = torch.exp2(torch.log2(spread).floor() + 1)
    return torch.nan_to_num(torch.round(mean / step) * step, nan=0, posinf=0, neginf=0)


def vq_st(inputs, codebook):
    """Replace each vector by its nearest code, with the straight-through gradient (section 3.2).

    inputs (..., D) and codebook (K, D) → codes like inputs, exactly rows of the codebook, and their flat indices (N,).
    Backward: the gradient of codes is copied unchanged to inputs, and scattered to the rows of the codebook that were
    used, as by an embedding look-up. VectorQuantizer withholds it from its codebook, which has a loss of its own.
    Raises ValueError as vq() does.
    """
    indices = vq(inputs, codebook)
    return straight_through(inputs, F.embedding(indices, codebook)), indices.flatten()


def straight_through(inputs, codes):
    """The codes; their gradient is also copied to the inputs, unchanged: dL/dz_e = dL/dz_q. Detach those that have
    a loss of their own.
    """
    return codes + (inputs - inputs.detach())                         # adds zero


@torch.no_grad()
def kmeans(latents, num_codes, iterations=KMEANS_ITERATIONS):
    """Lloyd's algorithm from random latents: (N, D) → centres (K, D). Draws from torch's generator.

    A centre that attracts no latent stays where it is. With N < K some centres coincide.
    """
    repeats = -(-num_codes // len(latents))
    order = torch.randperm(len(latents), device=latents.device).repeat(repeats)[:num_codes]
    centres = latents[order].float()                                  # (K, D)
    for _ in range(iterations):
        assigned = vq(latents, centres)                               # (N,)
        # Not bincount(), which waits for a GPU to know how long its result is.
        ones = torch.ones_like(latents[:, :1], dtype=torch.float32)
        sizes = torch.zeros_like(centres[:, :1]).index_add_(0, assigned, ones)            # (K, 1)
        sums = torch.zeros_like(centres).index_add_(0, assigned, latents.float())         # (K, D)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


# ---------------------------------------------------------------- shapes of latents and indices

def _to_rows(z_e, dim):
    """Latents (B, D, h, w), or of another rank (..., D) → (N, D), and their indices' shape, (B, h, w) or (...)."""
    last = z_e.permute(0, 2, 3, 1) if z_e.dim() == 4 else z_e         # (..., D)
    if last.shape[-1:] != (dim,):
        raise ValueError(f"z_e {tuple(z_e.shape)} is not (B, {dim}, h, w), or of another rank (..., {dim})")
    return last.reshape(-1, dim), last.shape[:-1]


def _from_rows(codes, shape):
    """Codes (N, D) of indices of this shape, as _to_rows() took the latents: (B, D, h, w) or (..., D)."""
    codes = codes.view(*shape, codes.shape[-1])
    return codes.permute(0, 3, 1, 2) if len(shape) == 3 else codes


def check_indices(indices, num_codes):
    """The indices as int64. Raises ValueError unless they are integers, and on the CPU if they leave [0, K).

    Those on a GPU are not read, which would wait for it: check them on the CPU, where they come in. Nor are they read
    in a compiled or exported graph, which cannot branch on values.
    """
    if indices.dtype not in INTEGERS:
        raise ValueError(f"indices are integers, not {indices.dtype}")
    indices = indices.long()
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or not indices.numel():
        return indices
    if not 0 <= indices.min() <= indices.max() < num_codes:
        raise ValueError(f"indices {indices.min()} to {indices.max()} leave [0, {num_codes})")
    return indices


# ---------------------------------------------------------------- the codebook

class VectorQuantizer(nn.Module):
    """A codebook of K codes of size D, learned from the latents and kept alive.

    codebook_update: `gradient` learns it by the codebook loss (eq. 3), `ema` by exponential moving averages of the
    latents that chose each code (appendix A.1). codebook_init: `kmeans` places the codes on the latents of the first
    training batch, `uniform` draws them from ±1/K. restart_after: a code that no latent chose for that many training
    steps is reset to a random latent of the batch; 0 means never. K-means and restarts are not in the paper
    (references.txt names their sources). All of the quantizer's state is in its state_dict. In evaluation mode
    nothing changes. In a torch.distributed group each process brings equally many images of the batch, and the codebook
    learns from all of them. Raises ValueError for another codebook_update or codebook_init.
    """

    def __init__(self, num_codes, dim, codebook_update="gradient", codebook_init="kmeans", restart_after=20):
        super().__init__()
        if codebook_update not in CODEBOOK_UPDATES:
            raise ValueError(f"codebook_update is {' or '.join(CODEBOOK_UPDATES)}, not {codebook_update!r}")
        if codebook_init not in CODEBOOK_INITS:
            raise ValueError(f"codebook_init is {' or '.join(CODEBOOK_INITS)}, not {codebook_init!r}")
        self.num_codes, self.dim, self.restart_after = num_codes, dim, restart_after
        self.ema = codebook_update == "ema"
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes),
                                     requires_grad=not self.ema)
        self.register_buffer("initialised", torch.tensor(codebook_init == "uniform"))
        self.register_buffer("steps_unused", torch.zeros(num_codes, dtype=torch.int64))
        if self.ema:        # each code starts as the mean of a single latent
            self.register_buffer("cluster_sizes", torch.ones(num_codes))              # N_i
            self.register_buffer("cluster_sums", self.codebook.detach().clone())      # m_i
        # How many codes have been reset. The training sets it to zero before each epoch, and saves it with its state.
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64), persistent=False)
        # The buffer's value, known without a host–device synchronisation at every step.
        self.known_initialised = codebook_init == "uniform"

    def forward(self, z_e):
        """z_e (B, D, h, w) or (..., D) → Quantized. Worked shapes: (16, 40, 7, 7) → 784 vectors of size 40.

        Output and losses are those of the codebook before this step's update and restarts.
        Raises ValueError for another shape.
        """
        flat, shape = _to_rows(z_e, self.dim)                         # (N, D), N = B·h·w
        flat = flat.to(self.codebook.dtype)                           # under autocast too
        positions = shape[1:].numel()                                 # h·w
        if self.training and not self.known_initialised:
            self._initialise(flat, positions)

        indices = vq(flat, self.codebook)                             # (N,)
        chosen = F.embedding(indices, self.codebook)                  # (N, D)
        codes = straight_through(flat, chosen.detach())               # (N, D), no gradient to the codebook
        codebook_loss = F.mse_loss(chosen, flat.detach())             # eq. 3, second term
        commitment_loss = F.mse_loss(flat, chosen.detach())           # eq. 3, third term / β
        if self.training and (self.ema or self.restart_after):
            self._update(flat, positions, indices)

        z_q = _from_rows(codes, shape)                                # (B, D, h, w)
        return Quantized(z_q, indices.view(shape), codebook_loss, commitment_loss)

    def encode(self, z_e):
        """The indices (B, h, w) or (...) of latents (B, D, h, w) or (..., D), without the losses."""
        flat, shape = _to_rows(z_e, self.dim)
        return vq(flat, self.codebook).view(shape)

    def lookup(self, indices):
        """The codes (B, D, h, w) of indices (B, h, w), or (..., D) of (...) of another rank than 3.

        Raises ValueError as check_indices().
        """
        indices = check_indices(indices, self.num_codes)
        return _from_rows(F.embedding(indices.flatten(), self.codebook), indices.shape)

    @torch.no_grad()
    def _initialise(self, flat, positions):
        if not self.initialised:
            all_codes = torch.ones_like(self.initialised).expand(self.num_codes)
            self._reset_codes(all_codes, _distributed_kmeans(flat, positions, self.num_codes))
            self.initialised.fill_(True)
        self.known_initialised = True

    @torch.no_grad()
    def _update(self, flat, positions, indices):
        """What a training step changes here: the averages, with ema, and the codes that have long been unused."""
        ones = torch.ones_like(flat[:, 0], dtype=torch.float32)
        sizes = torch.zeros(self.num_codes, device=flat.device).index_add_(0, indices, ones)      # (K,)
        if self.ema:
            sums = torch.zeros_like(self.cluster_sums).index_add_(0, indices, flat)   # (K, D)
            _all_reduce_sums(sizes, sums)
            self._update_ema(sizes.to(sums.dtype), sums)
        else:
            _all_reduce_sums(sizes)
        if self.restart_after:
            self._restart_unused(flat, positions, sizes)

    def _update_ema(self, sizes, sums):
        """One step of appendix A.1: N_i and m_i decay towards this batch, and e_i = m_i / N_i, with N_i smoothed.

        sizes (K,), sums (K, D): of the latents that chose each code.
        """
        self.cluster_sizes.lerp_(sizes, 1 - EMA_DECAY)
        self.cluster_sums.lerp_(sums, 1 - EMA_DECAY)
        # Laplace smoothing keeps the size of a code that nothing chooses from reaching zero.
        total = self.cluster_sizes.sum()
        smoothed = (self.cluster_sizes + LAPLACE) / (total + self.num_codes * LAPLACE) * total
        self.codebook.copy_(self.cluster_sums / smoothed.unsqueeze(1))

    def _restart_unused(self, flat, positions, sizes):
        self.steps_unused.add_(1).masked_fill_(sizes > 0, 0)
        unused = self.steps_unused >= self.restart_after              # (K,)
        # One candidate for each code, needed or not: counting the unused ones would wait for a GPU.
        rows = torch.randint(len(flat) * _rank_and_world_size()[1], (self.num_codes,), device=flat.device)
        if flat.device.type == "cpu" and not torch.compiler.is_compiling() and not unused.any():
            return
        self._reset_codes(unused, _gather_rows(flat, positions, rows))
        self.restarts += unused.sum()

    def _reset_codes(self, mask, latents):
        """Replace the codes where mask (K,) is set by latents (K, D), and reset the statistics of these codes."""
        rows = mask.unsqueeze(1)                                      # (K, 1)
        self.codebook.copy_(torch.where(rows, latents, self.codebook))
        self.steps_unused.masked_fill_(mask, 0)
        if self.ema:
            self.cluster_sizes.masked_fill_(mask, 1)
            self.cluster_sums.copy_(torch.where(rows, self.codebook, self.cluster_sums))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.known_initialised = self.initialised.item()


# ---------------------------------------------------------------- several processes
# Image i of the whole batch is image i // world_size of process i % world_size.

def _rank_and_world_size():
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _all_reduce_sums(*tensors):
    """Replace tensors by their sums over all processes, in one message."""
    if _rank_and_world_size()[1] > 1:
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def _distributed_kmeans(flat, positions, num_codes):
    """kmeans() of the latents of all processes; each has flat (B·h·w, D), of B images with h·w positions."""
    _, world_size = _rank_and_world_size()
    if world_size == 1:
        return kmeans(flat, num_codes)
    shards = [torch.empty_like(flat) for _ in range(world_size)]
    dist.all_gather(shards, flat.contiguous())
    batch = torch.stack([shard.view(-1, positions, shard.shape[1]) for shard in shards], dim=1)   # (B, world, h·w, D)
    centres = kmeans(batch.flatten(0, 2), num_codes)
    dist.broadcast(centres, 0)          # processors of another kind may round differently
    return centres


def _gather_rows(flat, positions, rows):
    """Rows (K,) of the latents of the whole batch, of which each process has flat (B·h·w, D): (K, D)."""
    rank, world_size = _rank_and_world_size()
    if world_size == 1:
        return flat[rows]
    images = rows // positions
    own = (images % world_size == rank).unsqueeze(1)
    chosen = torch.where(own, flat[images // world_size * positions + rows % positions], 0)
    _all_reduce_sums(chosen)
    return chosen


# ---------------------------------------------------------------- finite scalar quantization

class FiniteScalarQuantizer(nn.Module):
    """FSQ (Mentzer et al. 2023, arXiv:2309.15505): d numbers, each bounded and rounded to one of its levels.

    levels: the numbers of levels L_1,…,L_d as text, such as "8,8,8"; their product is num_codes. Linear maps take the
    latent to the d numbers and back, and are all that is learned: there is no codebook to keep alive, and both losses
    are zero. Shapes are those of VectorQuantizer. Raises ValueError for other levels or another num_codes.
    """

    def __init__(self, num_codes, dim, levels="8,8,8"):
        super().__init__()
        try:
            sizes = [int(size) for size in str(levels).split(",")]
        except ValueError:
            sizes = [0]
        if not all(2 <= size <= MAX_FSQ_LEVELS for size in sizes) or len(sizes) > 20 or (
                math.prod(sizes) > MAX_FSQ_CODES):
            raise ValueError(f"levels {str(levels)[:100]!r} are not integers from 2 to {MAX_FSQ_LEVELS}, such as "
                             f"8,8,8, with a product of up to {MAX_FSQ_CODES:,}")
        if num_codes != math.prod(sizes):
            raise ValueError(f"num_codes {num_codes} is not {math.prod(sizes)}, the product of the levels {levels}")
        self.num_codes, self.dim = num_codes, dim
        self.project_in, self.project_out = nn.Linear(dim, len(sizes)), nn.Linear(len(sizes), dim)
        place_values = [math.prod(sizes[:i]) for i in range(len(sizes))]              # 1, L_1, L_1·L_2, …
        self.register_buffer("levels", torch.tensor(sizes), persistent=False)         # (d,)
        self.register_buffer("place_values", torch.tensor(place_values), persistent=False)

    def forward(self, z_e):
        flat, shape = _to_rows(z_e, self.dim)                         # (N, D)
        with torch.autocast(flat.device.type, enabled=False):         # in the dtype of the weights
            bounded = self._bound(self.project_in(flat.to(self.project_in.weight.dtype)))     # (N, d)
        rounded = bounded.round()
        indices = ((rounded.nan_to_num().long() + self.levels // 2) * self.place_values).sum(dim=1)   # mixed radix
        z_q = self._project_out(straight_through(bounded, rounded.detach()), shape)
        return Quantized(z_q, indices.view(shape), z_q.new_zeros(()), z_q.new_zeros(()))

    def encode(self, z_e):
        return self(z_e).indices

    def lookup(self, indices):
        indices = check_indices(indices, self.num_codes)
        rounded = indices.reshape(-1, 1) // self.place_values % self.levels - self.levels // 2        # (N, d)
        return self._project_out(rounded.to(self.project_out.weight.dtype), indices.shape)

    def _bound(self, z):
        """z (N, d), bounded so that number i rounds to the L_i integers from −⌊L_i/2⌋ on; near 0 for z = 0."""
        half = (self.levels.to(z.dtype) - 1) * (1 - 1e-3) / 2
        offset = (1 - self.levels % 2) / 2                            # an even number of levels is not symmetric
        return torch.tanh(z + torch.tan(offset / half)) * half - offset

    def _project_out(self, rounded, shape):
        """The codes of integers (N, d), which are scaled to [−1, 1]."""
        with torch.autocast(rounded.device.type, enabled=False):
            return _from_rows(self.project_out(rounded / (self.levels // 2)), shape)


# The quantizers that VQ-VAE.py --quantizer chooses from, by name.
QUANTIZERS = {"vq": VectorQuantizer, "fsq": FiniteScalarQuantizer}
