"""Energy-inspired self-supervised pretraining for vision models, in one file.

One vision network is an energy: its forward pass gives one number per image, low for data. Its
backward pass restores: a corrupted image walks down the energy and comes back clean. Training asks
the walk to end at the original. No decoder, no teacher, no heavy augmentation:

    E(x)                                one scalar per image, the network's forward pass       (1)
    x_{k+1} = x_k - alpha dE/dx(x_k)    the backward pass restores, K steps from x_tilde       (2)
    loss    = mean_k smooth_l1(x_k, x)  every step should land on the clean image x            (3)
            + w relu(1/4 - r)           and what is corrupted should lie higher than x,        (4)
              r = 2 alpha (E(x_s) - E(x)) / |x_s - x|^2, x_s = x + s (x_tilde - x), s in [0, 1]

Why should an energy appear when one learns to restore? Corrupt x with Gaussian noise of standard
deviation sigma and take the squared error. The best restoration is then the posterior mean, which
by Tweedie's formula is x_tilde + sigma^2 grad log p_sigma(x_tilde); compare with (2): alpha E has
become -sigma^2 log p_sigma up to a constant (denoising score matching, Vincent 2011). Hiding,
shuffling, shrinking and greying are other ways to leave the data; the same walk leads back.

    python energy_pretrain.py                                  # all five tasks, built-in images
    python energy_pretrain.py --task color --data ~/Pictures   # any folder of images
    torchrun --nproc_per_node=8 energy_pretrain.py --task mim  # eight GPUs, or CPU processes

Sections 1 to 4 are the method, with `corrupt_batch` of 10, what a step trains on; the others are
plumbing. Letters: B images, C channels, H W pixels (S by S if square), P patch side, N patches, T
tokens, D width, h heads, M of anything else, K restoration steps (`num_steps`; the variable `step`
is the optimiser's). x is clean, x_tilde corrupted, x_hat restored. Low energy is data; mask 1 is
hidden; pixels lie in [-1, 1].

References. Wang, Wang, Liu, Qiu: Energy-Inspired Self-Supervised Pretraining for Vision Models,
ICLR 2023 (arXiv 2302.01384; its hyper-parameters are not known to us, every default is our choice).
Vincent: A connection between score matching and denoising autoencoders, Neural Computation 2011.
Dosovitskiy et al.: An image is worth 16x16 words, ICLR 2021. He et al.: Masked autoencoders are
scalable vision learners, CVPR 2022. Malladi et al.: On the SDEs and scaling rules for adaptive
gradient algorithms, NeurIPS 2022. Jordan et al.: Muon, an optimizer for hidden layers, 2024
(kellerjordan.github.io/posts/muon).
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

class UserError(Exception):
    """What the person at the command line can put right: one line, exit status 2, no traceback."""

# ---- 1. Images and patches ---------------------------------------------------------------------
# Pixels lie in [-1, 1] (mean 0.5 and standard deviation 0.5, as many of timm's ViTs expect), so
# that zero is mid-grey, and the luma of an image is in the same units as the image.

def patchify(x, patch):
    """Cut x (B, C, H, W) into its square patches of side P: (B, N, C*P*P), row by row."""
    x = F.pixel_unshuffle(x, patch)                             # (B, C*P*P, H/P, W/P)
    return x.flatten(2).transpose(1, 2).contiguous()                            # (B, N, C*P*P)

def unpatchify(patches, patch, height):
    """Undo `patchify`: put patches (B, N, C*P*P) back into images (B, C, H, W) of this height."""
    x = patches.transpose(1, 2).unflatten(2, (height // patch, -1))     # (B, C*P*P, H/P, W/P)
    return F.pixel_shuffle(x, patch)                                            # (B, C, H, W)

def psnr(mean_squared_error):
    """Peak signal-to-noise ratio in dB of an error in [-1, 1] units, whose peak-to-peak is 2."""
    return -10 * math.log10(max(mean_squared_error, 1e-12) / 4)

def make_generator(device, *key):
    """A generator that is a pure function of integers such as (seed, step, rank): no random state
    need ever be saved, and a resumed run draws what it would have drawn. Seeds below zero are ours,
    such as -2 for what is held out. (Never -1: in Python hash(-1) == hash(-2).)"""
    return torch.Generator(device).manual_seed(hash(key) % 2**63)

# ---- 2. Corruptions ----------------------------------------------------------------------------
# Five verbs, one signature: images and a generator in, images of the same shape out. To add a
# sixth task, write its verb, give it a line in CORRUPTIONS, and its options lines in FLAGS.

def hide_blocks(x, generator, mask_ratio=0.5, mask_grid=8):
    """Masked image modelling: paint exactly round(mask_ratio * M) of the M = mask_grid^2 blocks of
    every image zero: mid-grey says nothing of what was there, is near the mean of images, and as a
    constant can be told from data."""
    B, block, M = len(x), x.shape[2] // mask_grid, mask_grid**2
    rank = torch.rand(B, M, generator=generator, device=x.device).argsort(1).argsort(1)
    mask = (rank < round(mask_ratio * M)).view(B, 1, mask_grid, mask_grid)
    return x.masked_fill(mask.repeat_interleave(block, 2).repeat_interleave(block, 3), 0)

def shuffle_patches(x, generator, sort_grid=4):
    """Patch sorting: cut every image into sort_grid x sort_grid pieces and permute them uniformly.
    Pixels in, pixels out: sorting is a restoration like the others and fits any architecture."""
    patch = x.shape[2] // sort_grid
    pieces = patchify(x, patch)                                                 # (B, M, C*P*P)
    order = torch.rand(pieces.shape[:2], generator=generator, device=x.device).argsort(1)
    return unpatchify(pieces.gather(1, order.unsqueeze(2).expand_as(pieces)), patch, x.shape[2])

def lower_resolution(x, generator, sr_factor=4):
    """Super-resolution: average squares of sr_factor pixels, then enlarge back bilinearly."""
    small = F.avg_pool2d(x, sr_factor)                                # (B, C, H/factor, W/factor)
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)

def add_noise(x, generator, noise_std=0.5):
    """Denoising: add Gaussian noise; noise_std is in units of x, whose range has length 2. The sum
    is not clipped: clipped noise would no longer be Gaussian."""
    return x + noise_std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

def remove_color(x, generator):
    """Colourisation: keep only the luma (ITU-R BT.601 weights), repeated in all three channels."""
    red, green, blue = x.split(1, dim=1)                                        # (B, 1, H, W)
    return (0.299 * red + 0.587 * green + 0.114 * blue).expand_as(x)

CORRUPTIONS = {  # task: (its verb, options for how hard it is, weight against others, by trial)
    "mim": (hide_blocks, ("mask_ratio", "mask_grid"), 2),
    "sort": (shuffle_patches, ("sort_grid",), 1),
    "sr": (lower_resolution, ("sr_factor",), 4),
    "denoise": (add_noise, ("noise_std",), 2),
    "color": (remove_color, (), 4)}
TASKS = tuple(CORRUPTIONS)

def corrupt(x, task, generator, strength=1.0, **options):
    """Corrupt images: x + s (x_tilde - x), where x_tilde is what the task's verb makes of x.

    x: (B, 3, S, S) in [-1, 1], never written to. task: one of TASKS. generator: the source of every
    random choice, on x's device. strength s: a number, or a tensor (B,), in [0, 1]; 0 gives x and 1
    the full corruption, exactly. options: those named in CORRUPTIONS; what another task uses is
    ignored, so one dict serves all. Returns a new tensor of x's shape and dtype."""
    verb, names, _ = CORRUPTIONS[task]
    x_tilde = verb(x, generator, **{name: options[name] for name in names if name in options})
    if torch.is_tensor(strength):               # a number made a tensor would wait for the GPU
        strength = strength.to(x).view(-1, 1, 1, 1)
    return torch.lerp(x, x_tilde, strength)     # exact at both ends, unlike x + s * (x_tilde - x)

# ---- 3. The energy -----------------------------------------------------------------------------
# A plain pre-norm Vision Transformer. Names and shapes of the parameters are timm's, so that the
# weights go wherever a ViT goes; only `head`, the energy read-out, is ours.

class Attention(nn.Module):
    """Multi-head self-attention. The softmax is written out because the fused kernels behind
    F.scaled_dot_product_attention have no second derivative, and training needs one."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                           # (B, T, D), T = N + 1 tokens
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))                 # (B, T, 3, h, D/h)
        x = self.attend(*qkv.permute(2, 0, 3, 1, 4))                            # (B, h, T, D/h)
        return self.proj(x.transpose(1, 2).flatten(2))

    def attend(self, q, k, v):              # `benchmark` puts a fused kernel here
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)    # (B, h, T, T)
        return weights @ v

class Block(nn.Module):
    """Transformer block: the tokens exchange what they know, then each computes on its own."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):                                                       # (B, T, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class ViT(nn.Module):
    """Vision Transformer whose forward pass is the energy of Eq. (1): (B, 3, H, W) -> (B,).

    The read-out multiplies each patch as it came in, embedded, p_n, with what the last layer, which
    has seen all patches, puts in its place, z_n: E(x) = 1/N sum_n sum_d v_d p_nd z_nd. So dE/dp_n
    has a direct term v_d z_nd / N: the last layer can say which way patch n should move, whatever
    the layers below carry back. (With all five tasks, reading the mean token alone took three times
    as many steps to restore as well.) The D weights v start at zero, where dE/dx = 0, so
    restoration begins as the identity. The class token is not read."""
    def __init__(self, image_size=32, patch_size=4, dim=96, depth=2, num_heads=3):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not divisible by patch size {patch_size}")
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 1, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1 and name.endswith("weight"):
                nn.init.xavier_uniform_(p.view(len(p), -1))     # a patch counted as one vector
        nn.init.zeros_(self.head.weight)
        self.init_local_attention()

    @torch.no_grad()
    def init_local_attention(self):
        """Let patches attend to their neighbours from the start; most of what is missing can be
        seen there. (With all tasks, hidden pixels were then restored 2 dB better.) Positions begin
        as waves of random frequency and phase, whose inner product falls with the distance d, in
        patches, like exp(-(0.7 d)^2 / 2) (random Fourier features: Rahimi and Recht, NeurIPS 2007).
        0.6 and 0.7 are by trial. Attention begins as it ends in trained networks (Trockman and
        Kolter, ICML 2023): keys equal queries, so that like attends to like, and the projection is
        minus the values' own, transposed, so that what a patch sees is taken away from it: what it
        shares with its neighbours fades."""
        nn.init.normal_(self.cls_token, std=0.6)
        dim, side = self.pos_embed.shape[2], math.isqrt(self.pos_embed.shape[1] - 1)
        place = torch.cartesian_prod(*[torch.arange(float(side))] * 2)          # (N, 2)
        waves = torch.cos(place @ (0.7 * torch.randn(2, dim)) + 2 * math.pi * torch.rand(dim))
        self.pos_embed[0, 1:] = 0.6 * math.sqrt(2) * waves      # of root mean square 0.6
        for block in self.blocks:
            query, key, value = block.attn.qkv.weight.chunk(3)          # (D, D) each, not copies
            key.copy_(query)
            block.attn.proj.weight.copy_(-value.T)

    def embed(self, x):
        """What every patch is, on its own: images (B, 3, H, W) -> (B, N, D)."""
        proj = self.patch_embed.proj    # a convolution with stride P: one linear map of each patch
        return F.linear(patchify(x, proj.stride[0]), proj.weight.flatten(1), proj.bias)

    def encode(self, patches):
        """What the network makes of them: (B, N, D) -> tokens (B, N+1, D), class token first."""
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)                                                        # (B, N+1, D)
        return self.norm(x)

    def represent(self, x):
        """One vector for each image, for a classifier: (B, 3, H, W) -> (B, D)."""
        return self.encode(self.embed(x))[:, 1:].mean(1)

    def forward(self, x):
        patches = self.embed(x)                                                 # (B, N, D)
        # products and a sum, not self.head(...), which autocast would round to bfloat16
        agreement = patches * self.head.weight * self.encode(patches)[:, 1:]    # (B, N, D)
        return agreement.sum(2).mean(1)                                         # Eq. (1): (B,)

def backbone_state(model):
    """The weights of use elsewhere: all but the read-out, under the network's own names."""
    state = getattr(model, "net", model).state_dict()   # with its modules' versions
    state.pop("head.weight", None)
    for name in state:
        state[name] = state[name].cpu()
    return state

class TorchvisionEnergy(nn.Module):
    """A torchvision network, its last layer (ValueError if not linear) replaced by the read-out."""
    def __init__(self, name, image_size):
        super().__init__()
        # one output also in training mode, in which `build_pretrainer` measures batch norm
        single = {"aux_logits": False, "init_weights": False}
        options = {"vit": {"image_size": image_size}, "maxvit": {"input_size": (image_size,) * 2},
                   "googlenet": single, "inception": single}.get(name.split("_")[0], {})
        self.net = torchvision.models.get_model(name, weights=None, **options)
        path, classifier = list(self.net.named_modules())[-1]
        if not isinstance(classifier, nn.Linear):
            raise ValueError("this network does not end in a linear layer")
        self.net.set_submodule(path, nn.Identity())
        self.head = nn.Linear(classifier.in_features, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        for module in self.net.modules():           # writing in place would destroy what the
            if hasattr(module, "inplace"):          # second backward pass still needs
                module.inplace = False

    def represent(self, x):                         # as in ViT: (B, 3, H, W) -> (B, D)
        return self.net(x)

    def forward(self, x):
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):    # twice differentiable
            return (self.represent(x) * self.head.weight).sum(1)

VIT_SIZES = {"nano": (96, 2, 3), "mini": (96, 4, 3), "tiny": (192, 12, 3), "small": (384, 12, 6),
             "base": (768, 12, 12), "large": (1024, 24, 16)}    # name: width D, depth, heads h

def build_model(name, image_size=32, patch_size=None):
    """An energy, (B, 3, image_size, image_size) -> (B,).

    name: one of VIT_SIZES, or a torchvision classification model. patch_size is for the ViTs: by
    default 16, below 128 pixels 4. In evaluation mode also while training: an energy is a function
    of one image, so no dropout and no batch statistics. ValueError if name or size is wrong."""
    if name not in VIT_SIZES:
        return TorchvisionEnergy(name, image_size).eval()
    return ViT(image_size, patch_size or (4 if image_size < 128 else 16), *VIT_SIZES[name]).eval()

# ---- 4. Restoration and loss: Eq. (2), (3) and (4) ---------------------------------------------

def restore(energy_fn, x_tilde, alpha=1.0, num_steps=1, create_graph=False):
    """Walk num_steps steps down the energy from x_tilde, Eq. (2): x_1 ... x_K, (K, B, 3, H, W).

    energy_fn: any callable from (B, 3, H, W) to (B,), each image on its own. alpha: the step size,
    a number or a scalar tensor. With create_graph each iterate can be differentiated by parameters
    and alpha, through its own step only; without, no graph is kept."""
    # The sum's gradient holds each image's own, since no energy depends on another image. Unlike
    # torch.autograd.grad, torch.func.grad works under torch.compile and under torch.no_grad().
    gradient = torch.func.grad(lambda x: energy_fn(x).float().sum())
    walk = [x_tilde]
    with torch.set_grad_enabled(create_graph):
        for _ in range(num_steps):
            x = walk[-1].detach()       # every step is trained to do its best from where it stands
            walk.append(x - alpha * gradient(x))                                # Eq. (2)
    return torch.stack(walk[1:])

def order_loss(energy_fn, x, x_s, alpha):
    """Eq. (4), a scalar: what is corrupted, x_s = x + s (x_tilde - x), should lie higher than x.

    Restoring x_tilde alone sets the slope there, not along the way. Let x_hat_t be where one step
    from x_t, of strength t, lands: dE/dx(x_t) = (x_t - x_hat_t) / alpha. These slopes add up to
        E(x_s) - E(x) = 1/alpha integral_0^s (x_t - x_hat_t) . (x_tilde - x) dt,
    which is |x_s - x|^2 / (2 alpha) if all land on x. Real steps fall short, so a quarter of this
    ideal is asked for. The loss is what is missing, as a share of the ideal, averaged over images;
    where the ideal is small, |x_s - x|^2 < 1, summed over pixels, an image counts less."""
    ideal = (x_s - x).square().flatten(1).sum(1) / 2        # alpha times as large, (B,)
    above, below = energy_fn(torch.cat([x_s, x])).chunk(2)
    return (F.relu(ideal / 4 - alpha * (above - below)) / ideal.clamp(min=0.5)).mean()  # Eq. (4)

def energy_loss(energy_fn, x, x_tilde, alpha, num_steps=1, weight=1.0, x_s=None, order_weight=0.0):
    """Eq. (3), the mean over K steps of smooth_l1(x_k, x), plus order_weight, w, times Eq. (4): a
    scalar to train through. smooth_l1(d) is d^2 / 2 up to |d| = 1, half the range, then linear.

    weight: of each image in (3), a number or (B,). x_s: the first len(x_s) images, corrupted with
    strengths of their own, for (4), or None. alpha (a tensor if x_s is given) as in `restore`."""
    x_hat = restore(energy_fn, x_tilde, alpha, num_steps, create_graph=True)    # (K, B, 3, H, W)
    error = F.smooth_l1_loss(x_hat, x.expand_as(x_hat), reduction="none")       # Eq. (3)
    loss = (error.flatten(2).mean(2) * weight).mean()
    if x_s is not None:     # alpha is learned by restoring alone; else it would grow to satisfy (4)
        loss = loss + order_weight * order_loss(energy_fn, x[:len(x_s)], x_s, alpha.detach())
    return loss

class Pretrainer(nn.Module):
    """The energy, its step size, the walk and the loss in one module, as DistributedDataParallel
    averages gradients after one forward call. alpha is large, as a ViT's E is a mean over patches,
    so that dE/dx is small; it is learned as a logarithm: always positive, changed by factors."""
    def __init__(self, model, alpha=256.0, num_steps=1, order_weight=0.002):
        super().__init__()
        self.model, self.num_steps, self.order_weight = model, num_steps, order_weight
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))
        self.loss_fn = energy_loss                              # `try_compile` puts another here

    def forward(self, x, x_tilde, weight=1.0, x_s=None):
        return self.loss_fn(self.model, x, x_tilde, self.log_alpha.exp(), self.num_steps, weight,
                            x_s, self.order_weight)

def freeze_unused(pretrainer, x):
    """Freeze the parameters that only shift the energy: having no part in dE/dx they never learn,
    and DDP would refuse the next step. So the read-out has no bias, and the last LayerNorm of
    vit_b_16 loses its own. One dry run, with any x_tilde, finds them in any network. UserError if
    no gradient differs from zero; RuntimeError if an operation has no second derivative."""
    pretrainer(x, x / 2).backward()     # behind a zero read-out most gradients are 0, not None
    if not any(p.grad is not None and p.grad.any() for p in pretrainer.parameters()):
        raise UserError("--model: no gradient reaches this network's parameters through dE/dx")
    for p in pretrainer.parameters():
        p.requires_grad_(p.grad is not None)
    pretrainer.zero_grad()

# ---- 5. Processes ------------------------------------------------------------------------------
# torchrun tells each process its place in environment variables; alone, it is a world of one.

RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))

def print0(*values, **options):
    if RANK == 0:
        print(*values, **options, flush=True)

def set_up_device(args):
    """Join the other processes, if any, and return this one's device."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32 for what stays in float32
    elif sys.platform == "linux":
        # What a step frees, the next asks for again. If the allocator keeps it, the system need not
        # clear new pages: a seventh more images a second. (mallopt(3); the numbers: malloc.h.)
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)         # M_MMAP_THRESHOLD: blocks up to 32 MiB are kept,
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD: however many lie free
    if WORLD_SIZE > 1:
        # Workers that torchrun has restarted must not read the addresses their predecessors left
        # in the store (pytorch/pytorch#135712). Across machines the counts may differ.
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD_SIZE):
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                store=store, rank=RANK, world_size=WORLD_SIZE)
    return device

# ---- 6. Data -----------------------------------------------------------------------------------
# Landscapes drawn on the spot, or image files. What step n trains on follows from (seed, n), so a
# run that was stopped goes on with what it would have seen: the same files with any number of
# processes, the same landscapes and corruptions only with as many, on the same kind of device.

EPOCH_OF_LANDSCAPES = 1_281_167     # they have no end; as many as ImageNet-1K count as one epoch
HELD_OUT = 256                      # crops of images never trained on that a run is evaluated on
NAMED_DATA = {  # name: (torchvision's class, its training split, its held-out split, classes)
    "cifar10": (torchvision.datasets.CIFAR10, {"train": True}, {"train": False}, 10),
    "cifar100": (torchvision.datasets.CIFAR100, {"train": True}, {"train": False}, 100),
    "stl10": (torchvision.datasets.STL10, {"split": "train+unlabeled"}, {"split": "test"}, 10)}

def draw_landscapes(batch_size, size, generator):
    """Draw images (B, 3, S, S) in [-1, 1] and the kind of their objects (B,), 0 ... 3, on the
    generator's device: a sky at some time of day, a wavy horizon, furrowed ground and three objects
    whose colour follows from their shape. Every task finds something to learn: order from sky and
    ground, colour from place and shape, what is hidden from what surrounds it."""
    B, device = batch_size, generator.device
    def uniform(low, high):
        return low + (high - low) * torch.rand(B, 1, 1, 1, generator=generator, device=device)
    def rgb(*values):
        return torch.tensor(values).view(1, 3, 1, 1).to(device, non_blocking=True)
    u = torch.linspace(0, 1, size, device=device).view(1, 1, 1, size)           # to the right
    v = u.transpose(2, 3)                                                       # downwards
    wave = torch.sin(2 * math.pi * (uniform(0.5, 1.5) * u + uniform(0, 1)))
    horizon = uniform(0.3, 0.6) + uniform(0.02, 0.08) * wave                    # (B, 1, 1, S)
    evening = uniform(0, 1)
    zenith = torch.lerp(rgb(0.25, 0.45, 0.85), rgb(0.25, 0.15, 0.4), evening)   # (B, 3, 1, 1)
    haze = torch.lerp(rgb(0.75, 0.88, 0.97), rgb(0.98, 0.6, 0.3), evening)
    sky = torch.lerp(zenith, haze, (v / horizon).clamp(0, 1))                   # (B, 3, S, S)
    below = (v - horizon).clamp(min=0)                                          # (B, 1, S, S)
    furrows = torch.sin(uniform(6, 14) * torch.log(below + 0.05) + uniform(-4, 4) * u)
    soil = torch.lerp(rgb(0.2, 0.5, 0.2), rgb(0.6, 0.5, 0.25), uniform(0, 1))
    ground = soil * (0.75 + 0.5 * below + 0.15 * furrows) * (1.1 - 0.4 * evening)
    x = torch.lerp(sky, ground, ((v - horizon) * size + 0.5).clamp(0, 1))       # (B, 3, S, S)

    kind = torch.randint(4, (B,), generator=generator, device=device)
    paint = torch.cat([rgb(0.9, 0.2, 0.2), rgb(0.95, 0.8, 0.2), rgb(0.25, 0.4, 0.9),
                       rgb(0.75, 0.3, 0.8)])[kind]                              # (B, 3, 1, 1)
    nearness = torch.rand(B, 3, generator=generator, device=device).sort(1).values
    for near in nearness.mul(0.85).add(0.15).view(B, 3, 1, 1, 1).unbind(1):     # the far ones first
        radius = 0.06 + 0.12 * near                                             # near: large, low
        du = (u - uniform(0, 1)) / radius                                       # (B, 1, 1, S)
        dv = (v - horizon - near * (0.9 - horizon)) / radius + 1                # (B, 1, S, S)
        distance = (du**2 + dv**2).sqrt()
        shapes = torch.cat([1 - distance,                                       # ball, inside > 0
                            1 - 1.15 * torch.maximum(du.abs(), dv.abs()),       # box
                            torch.minimum(0.9 - dv, (1 + dv - 2 * du.abs()) / 2),   # tree
                            0.35 - (distance - 0.65).abs()], 1)                 # ring
        inside = shapes.gather(1, kind.view(B, 1, 1, 1).expand_as(distance))    # (B, 1, S, S)
        shade = (0.75 - 0.35 * du - 0.15 * dv).clamp(0.25, 1.2)                 # lit from the left
        x = torch.lerp(x, paint * shade, (inside * radius * size + 0.5).clamp(0, 1))
    return x.clamp(0, 1) * 2 - 1, kind

def read_image(path, short_side):
    """Decode an image file as a viewer shows it, RGB, its short side at most short_side pixels."""
    with Image.open(path) as image:
        image.draft("RGB", (short_side, short_side))   # JPEG: decode at a reduced scale, far faster
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                  # 16 bits a pixel
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:                 # on white paper
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    scale = short_side / min(image.size)
    return image if scale >= 1 else image.resize([max(1, round(n * scale)) for n in image.size])

class Crops(torch.utils.data.Dataset):
    """Square crops: item (index, seed) -> (pixels, uint8 (3, S, S); label; unreadable files).

    source: a sequence of (path or PIL image, label). augment: crop and flip at random, as the seed
    says, instead of taking the middle. A file that cannot be decoded is replaced by the next, and
    named, with the kind of error: collating needs a string, in which a NUL parts the names.
    Images are kept, shrunken to three times the size of the crops, some 256 MiB in each worker, so
    that a small folder of large photographs is not decoded in every epoch."""
    def __init__(self, source, size, augment):
        self.source, self.short_side, self.cache, self.named = source, 3 * size, {}, {""}
        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()] if augment \
            else [v2.Resize(size), v2.CenterCrop(size)]
        self.crop = v2.Compose([*steps, v2.PILToTensor()])

    def load(self, index):
        if index in self.cache:
            return self.cache[index]
        item, label = self.source[index]
        image = read_image(item, self.short_side) if isinstance(item, str) else item.convert("RGB")
        if len(self.cache) < 2**28 // (4 * self.short_side**2):
            self.cache[index] = image, label
        return image, label

    def __getitem__(self, key):
        index, seed = key
        unreadable, image, label = [], Image.new("RGB", (1, 1)), 0
        for i in range(100):                    # if all fail, `image_batches` ends the run
            try:
                image, label = self.load((index + i) % len(self.source))
                break
            except Exception as error:          # on damaged files Pillow raises anything
                path = self.source[(index + i) % len(self.source)][0]
                unreadable.append(f"{path} ({type(error).__name__})")
        with torch.random.fork_rng(devices=[]):     # torchvision draws from the global state
            torch.default_generator.manual_seed(seed)
            return self.crop(image), label, "\0".join(unreadable)

def open_data(args):
    """The training and the held-out images as `Crops`, (None, None) for the endless landscapes, and
    the number of classes: the folders right below DIR. args.labels keeps that many images only."""
    if args.data == "procedural":
        if args.labels is None:
            return None, None, 4
        drawn = draw_landscapes(args.labels, args.image_size, make_generator("cpu", args.seed, -3))
        source = [(v2.functional.to_pil_image(x / 2 + 0.5), int(label)) for x, label in zip(*drawn)]
        return Crops(source, args.image_size, args.augment), None, 4
    if args.data in NAMED_DATA:
        dataset, *splits, classes = NAMED_DATA[args.data]
        if args.finetune and args.data == "stl10":
            splits[0] = {"split": "train"}                  # the labelled part
        try:                            # rank 0 downloads, then the others find the files there
            if RANK > 0:
                dist.barrier()
            sources = [dataset("data", download=True, **split) for split in splits]
            if RANK == 0 and WORLD_SIZE > 1:
                dist.barrier()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {args.data}: cannot be downloaded to ./data ({error})")
    else:
        if not os.path.isdir(args.data):
            raise UserError(f"--data {args.data}: no such folder, nor {', '.join(NAMED_DATA)}")
        endings = torchvision.datasets.folder.IMG_EXTENSIONS + (".gif",)
        paths, seen = [], set()
        for folder, folders, names in os.walk(args.data, followlinks=True):
            if os.path.realpath(folder) in seen:            # by a link, which may lead in circles
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
            paths += [os.path.join(folder, name) for name in names         # but not a run's picture
                      if name.lower().endswith(endings) and not name.endswith("restorations.png")]
        files = sorted(filter(os.path.isfile, paths))       # a pipe would be waited for
        if len(files) < 2:
            raise UserError(f"--data {args.data}: {len(files)} image files there or below, needs 2")
        kinds = [os.path.relpath(os.path.dirname(f), args.data).split(os.sep)[0] for f in files]
        number = {kind: i for i, kind in enumerate(sorted(set(kinds)))}
        pairs = [(f, number[kind]) for f, kind in zip(files, kinds)]
        classes, sources = len(number), [[p for i, p in enumerate(pairs) if i % 10], pairs[::10]]
    if args.labels is not None:
        order = torch.randperm(len(sources[0]), generator=make_generator("cpu", args.seed, -3))
        sources[0] = torch.utils.data.Subset(sources[0], order[:args.labels].tolist())
    return *(Crops(source, args.image_size, args.augment) for source in sources), classes

def crop_keys(num_images, batch_size, steps, seed, rank, world_size):
    """For every step this process's part of the global batch, as keys (index, seed) for `Crops`.

    The images stand in one endless row, each epoch a new permutation, and step n takes the n-th
    batch of the row: every image comes once an epoch, however many processes there are."""
    part, epoch = batch_size // world_size, None
    for step in steps:
        keys, first = [], step * batch_size + rank * part
        for position in range(first, first + part):
            if epoch != position // num_images:
                epoch = position // num_images
                order = torch.randperm(num_images, generator=make_generator("cpu", seed, epoch))
            keys.append((int(order[position % num_images]), hash((seed, position)) % 2**63))
        yield keys

def ignore_signals(worker):
    """For decoders: Ctrl-C reaches them, too, but `stop_signals` says when a run ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

def image_batches(args, crops, device, batch_size, steps, seed, rank=0, world_size=1, workers=0):
    """Yield, step by step, this process's clean images (B, 3, S, S) in [-1, 1] and labels (B,)."""
    if crops is None:
        for step in steps:
            generator = make_generator(device, seed, step, rank)
            yield draw_landscapes(batch_size // world_size, args.image_size, generator)
        return
    keys = crop_keys(len(crops.source), batch_size, steps, seed, rank, world_size)
    for pixels, labels, unreadable in torch.utils.data.DataLoader(
            crops, batch_sampler=keys, num_workers=workers, pin_memory=device.type == "cuda",
            worker_init_fn=ignore_signals):
        for paths in (names.split("\0") for names in unreadable):
            for path in set(paths) - crops.named:       # each file is named once
                print(f"warning: skipping unreadable image {path!r}", file=sys.stderr, flush=True)
                crops.named.add(path)
            if len(paths) == 100:                       # no image was found
                raise UserError(f"--data {args.data}: 100 unreadable images, to {paths[-1]!r}")
        yield pixels.to(device, non_blocking=True) / 127.5 - 1, labels.to(device, non_blocking=True)

# ---- 7. Optimiser and schedule -----------------------------------------------------------------

def build_optimizers(module, weight_decay):
    """Muon for the matrices inside the network, AdamW for all else: a list of the two.

    Muon (Jordan et al., 2024) replaces a matrix's momentum by roughly the nearest orthogonal
    matrix: all its directions move about equally far. These steps are scaled to AdamW's size, so
    that one learning rate serves both. Biases, norms, scales, position and class embeddings (by the
    names that our and torchvision's networks give them) and log alpha do not decay."""
    inner, decaying, exempt = [], [], []        # a ResNet has no inner ones
    for name, p in module.named_parameters():
        spared = p.ndim < 2 or name.endswith(("_embed", "_embedding", "_token", "_table", "_scale"))
        inside = p.ndim == 2 and name.startswith("model.") and name != "model.head.weight"
        (exempt if spared else inner if inside else decaying).append(p)
    groups = [{"params": decaying}, {"params": exempt, "weight_decay": 0.0}]
    common = {"lr": 0.0, "weight_decay": weight_decay}
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), **common), torch.optim.Muon(
        [{"params": inner}], momentum=0.9, adjust_lr_fn="match_rms_adamw", **common)]

def learning_rate(args, step):
    """The rate of 0-based `step`: linear warm-up, then half a cosine to zero. The peak is
    lr * sqrt(batch_size / 256), the scaling rule of adaptive optimisers (Malladi et al., 2022)."""
    peak, warmup = args.lr * math.sqrt(args.batch_size / 256), args.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (args.max_steps - warmup))) / 2

# ---- 8. Files and checkpoints ------------------------------------------------------------------
# Plain dicts of tensors, numbers and strings, so that loading one can run no code.

# not compared when a run goes on from its checkpoint, nor taken from there by --evaluate
FREE_FIELDS = {"out", "resume", "evaluate", "compile", "workers", "device", "save_every", "lr"}

def write_file(args, name, write):
    """Let write(file) fill OUT/name: under another name first, and then moved into place, so that
    whatever happens, the path holds the old file or the new one, never half of it."""
    path, unfinished = Path(args.out, name), Path(args.out, "unfinished-" + name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())             # on the disk before it has the name
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:    # torch.save hides the former behind the latter
        with contextlib.suppress(OSError):      # where nothing can be written, nothing is left
            unfinished.unlink()
        raise UserError(f"{path}: cannot be written ({error.__context__ or error})")

def save_checkpoint(args, module, optimizers, step):
    """Write OUT/backbone.pt, the weights to use, and OUT/checkpoint.pt, all that resuming needs."""
    checkpoint = {"module": module.state_dict(), "step": step, "config": vars(args),
                  "optimizers": [o.state_dict() for o in optimizers],
                  "versions": [str(torch.__version__), str(torchvision.__version__)]}
    backbone = backbone_state(module.model)
    write_file(args, "backbone.pt", lambda file: torch.save(backbone, file))
    write_file(args, "checkpoint.pt", lambda file: torch.save(checkpoint, file))

def load_checkpoint(path, module=None, optimizers=()):
    """Read a checkpoint, and its state into what is given; return (configuration, step). UserError
    if there is none, or it is damaged, or it does not fit."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no checkpoint there; train first, or name that of a run")
    try:
        if zipfile.ZipFile(path).testzip():         # torch.load does not check the checksums
            raise ValueError("checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if module is not None:
            module.load_state_dict(checkpoint["module"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=bool(optimizers)):
            optimizer.load_state_dict(state)
        return dict(checkpoint["config"]), int(checkpoint["step"])
    except Exception as error:      # a damaged file can make the unpickler raise anything
        raise UserError(f"{path}: no checkpoint of this script, model and image size, or damaged "
                        f"({type(error).__name__}); to train anew: another --out, or --no-resume")

def resume(args, module, optimizers):
    """Go on from OUT's checkpoint if there is one; return the number of steps already taken. Lines
    that the log gained after the checkpoint are cut off: those steps will be taken again."""
    step, log, path = 0, Path(args.out, "log.jsonl"), Path(args.out, "checkpoint.pt")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"    # by torchrun
    if path.exists() and not (args.resume or restarted):
        if RANK == 0:           # or the next run would go on from there if this one is not saved
            path.replace(Path(args.out, "previous-checkpoint.pt"))
    elif path.exists():
        then, step = load_checkpoint(path)
        differing = [f"{k} ({then.get(k)} there, {v} now)" for k, v in sorted(vars(args).items())
                     if k not in FREE_FIELDS and v != then.get(k)]
        if differing:
            raise UserError(f"{path} has another configuration, {'; '.join(differing)}: "
                            "take another --out, or --no-resume")
        load_checkpoint(path, module, optimizers)
        print0(f"resuming  after step {step}")
    if WORLD_SIZE > 1:
        steps = [None] * WORLD_SIZE
        dist.all_gather_object(steps, step)
        if min(steps) < max(steps):
            raise UserError(f"{path} is not the same for all processes: share --out among machines")
    if RANK == 0:
        text = log.read_text(errors="replace") if step and log.exists() else ""
        lines = re.findall(r'^({"step": (\d+), .*}\n)', text, re.MULTILINE)    # but not torn ones
        kept = "".join(line for line, number in lines if int(number) <= step)
        write_file(args, "log.jsonl", lambda file: file.write(kept.encode()))
    return step

# ---- 9. Evaluation -----------------------------------------------------------------------------
# Fixed corruptions, in full and along the way. No gradients but those that `restore` takes itself.

def corruption_options(args):
    """How hard the tasks are, as `corrupt` takes it."""
    return {name: getattr(args, name) for _, names, _ in CORRUPTIONS.values() for name in names}

@torch.no_grad()
def evaluate(pretrainer, x, tasks, options, chunk=64):
    """Corrupt and restore images x (M, 3, S, S), and ask whether low energy means data, on one
    process: {task: {name: value}}.

    psnr_corrupted and psnr_restored (one value a step): dB of the squared error averaged over all
    images, since a mean of per-image decibels is ruled by images that the corruption hardly
    touches; *_hidden (mim): the same over hidden pixels. psnr_clean, psnr_quarter: of a clean image
    after one step, of a quarter-corrupted one before and after. energy_clean, _corrupted,
    _restored: means. order, order_quarter: share of images that lie lower than themselves at full
    and at a quarter of the corruption. auroc: share of the pairs of any clean and any corrupted
    image in which the clean one lies lower. descent: share of images whose energy the first step
    lowers. (Ties count as failures.) rank_correlation: Spearman's, of E(x_s) - E(x) and
    |x_s - x|^2, at strengths s up to 1. slope: their median ratio times 2 alpha, ideally 1."""
    model, alpha, metrics = pretrainer.model, pretrainer.log_alpha.exp(), {}
    def energy(y):                                                              # (M,)
        return torch.cat([model(part) for part in y.split(chunk)]).double()
    def walk(y, num_steps=1):                                                   # (K, M, 3, S, S)
        return torch.cat([restore(model, part, alpha, num_steps) for part in y.split(chunk)], 1)
    def mean(values):
        return values.double().mean().item()
    def decibels(y, where=...):
        return psnr(mean((y - x)[where].square()))
    clean, psnr_clean = energy(x), decibels(walk(x)[0])
    s = torch.linspace(1 / len(x), 1, len(x), device=x.device).view(-1, 1, 1, 1)    # one an image
    for task in tasks:
        x_tilde = corrupt(x, task, make_generator(x.device, -2, TASKS.index(task)), **options)
        x_hat, corrupted = walk(x_tilde, pretrainer.num_steps), energy(x_tilde)
        restored = [energy(x_k) for x_k in x_hat]
        quarter, x_s = torch.lerp(x, x_tilde, 0.25), torch.lerp(x, x_tilde, s)
        rise, distance = energy(x_s) - clean, (x_s - x).square().flatten(1).sum(1).double()
        ranks = [(v[:, None] - v).sign().sum(1) for v in (rise, distance)]  # centred; ties share
        regions = {"": ...} | ({"_hidden": x_tilde != x} if task == "mim" else {})
        row = metrics[task] = {}
        for region, where in regions.items():
            row["psnr_corrupted" + region] = decibels(x_tilde, where)
            row["psnr_restored" + region] = [decibels(x_k, where) for x_k in x_hat]
        row |= {
            "energy_clean": mean(clean), "energy_corrupted": mean(corrupted),
            "energy_restored": mean(restored[-1]), "psnr_clean": psnr_clean,
            "order": mean(clean < corrupted), "order_quarter": mean(clean < energy(quarter)),
            "auroc": mean(clean[:, None] < corrupted), "descent": mean(restored[0] < corrupted),
            "psnr_quarter": [decibels(quarter), decibels(walk(quarter)[0])],
            "rank_correlation": F.cosine_similarity(*ranks, dim=0).item(),
            # 0 / 0, where there was nothing to corrupt, is left out; if there is only that, 0
            "slope": (2 * alpha * rise / distance).nanmedian().nan_to_num().item()}
    return metrics

def print_table(metrics, num_steps):
    """A row for each metric of `evaluate`, a column for each task."""
    width = 6 * max(2, num_steps) + 3
    print(f"\n{'(PSNR in dB)':<24}" + "".join(f"{task:<{width}}" for task in metrics))
    for name in max(metrics.values(), key=len):         # *_hidden is there for one task only
        digits = 2 if "psnr" in name else 3
        cells = (torch.tensor(row.get(name, [])).flatten().tolist() for row in metrics.values())
        texts = (" ".join(f"{value:.{digits}f}" for value in cell) for cell in cells)
        print(f"{name:<24}" + "".join(f"{text:<{width}}" for text in texts))

def draw_picture(pretrainer, x, tasks, options):
    """For every task a row each of clean, corrupted and restored images, named in the margin."""
    rows = []
    for task in tasks:
        x_tilde = corrupt(x, task, make_generator(x.device, -2, TASKS.index(task)), **options)
        x_hat = restore(pretrainer.model, x_tilde, pretrainer.log_alpha.exp(), pretrainer.num_steps)
        rows += [(f"{task}: clean", x), ("corrupted", x_tilde)]
        rows += [(f"restored, step {k}", x_k) for k, x_k in enumerate(x_hat, 1)]
    tiles = torch.cat([row for _, row in rows]).cpu().clamp(-1, 1) / 2 + 0.5
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // tiles.shape[3]))     # nearest neighbour
    grid = torchvision.utils.make_grid(tiles, nrow=len(x), padding=4, pad_value=1.0)
    picture = ImageOps.expand(v2.functional.to_pil_image(grid), (120, 0, 0, 0), "white")
    for i, (name, _) in enumerate(rows):        # beside the middle of its row
        ImageDraw.Draw(picture).text((8, (i + 0.5) * (tiles.shape[2] + 4) - 4), name, fill="black")
    return picture

# ---- 10. Training ------------------------------------------------------------------------------

LOG_EVERY = 50          # steps

def autocast(device):
    """bfloat16 on CUDA. Never float16: a gradient scaler does not guard the inner gradient. (It
    moves dE/dx by half a per cent in a ViT or a ConvNeXt, by half in a ResNet: kinks of ReLUs.)"""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

def try_compile(args, pretrainer, x):
    """Compile the loss, restorations and all, for images like x (B, 3, S, S), or keep it eager."""
    pretrainer.loss_fn = torch.compile(energy_loss, fullgraph=True)
    try:
        with autocast(x.device):
            pretrainer(x, *corrupt_batch(args, pretrainer, x, 0)).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:      # the compiler's errors have no common class
        pretrainer.loss_fn = energy_loss
        words = f"{type(error).__name__}: {error}".split("\n")[0]   # from each, as one slows all
        print(f"warning: process {RANK} goes on without compiling ({words})", file=sys.stderr)

def train_step(module, optimizers, inputs, rate):
    """One optimiser step; returns the loss and the gradient norm before clipping, as (2,)."""
    module.zero_grad()
    with autocast(inputs[0].device):
        loss = module(*inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return torch.stack([loss.detach(), norm])

def check_finite(recent, step):
    """The mean loss and last gradient norm of the `recent` train_steps up to `step`. So far they
    stayed on the device, which need not wait; averaged over processes, all raise one UserError."""
    values = torch.stack(recent)                                                # (steps, 2)
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    for i, (loss, norm) in enumerate(values.tolist(), step - len(recent) + 1):
        if not math.isfinite(loss + norm):
            raise UserError(f"step {i}: loss {loss}, gradient norm {norm}; not saved; lower --lr")
    return values[:, 0].mean().item(), values[-1, 1].item()

def log_progress(record, args):
    """One line to the screen, overwritten if that is a terminal, and one to OUT/log.jsonl."""
    try:
        with open(Path(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"{args.out}/log.jsonl: cannot be written ({error})")
    r, terminal = record, sys.stdout.isatty()
    left = int((args.max_steps - r["step"]) * args.batch_size / r["images_per_second"])   # seconds
    what = f"accuracy {r['accuracy']:.1%}" if args.finetune else (
        f"{r['task']:>7} {r['psnr_corrupted']:5.2f} -> {r['psnr_restored'][-1]:5.2f} dB  E clean "
        f"{r['energy_clean']:.2f} corrupted {r['energy_corrupted']:.2f} restored "
        f"{r['energy_restored']:.2f}  alpha {r['alpha']:.1f}")
    line = (f"step {r['step']:>5}/{args.max_steps}  loss {r['loss']:.4f}  {what}  grad "
            f"{r['gradient_norm']:.3f}  lr {r['lr']:.1e}  {r['images_per_second']:.0f} images/s  "
            f"{left // 60}:{left % 60:02} left")
    end = "" if terminal and r["step"] < args.max_steps else "\n"
    print("\r\033[K" * terminal + line, end=end, flush=True)

def corrupt_batch(args, pretrainer, x, step):
    """Corrupt images (B, 3, S, S) for a step; return what Pretrainer.forward takes after x:
    x_tilde, the images' weights (B,), and for Eq. (4) x_s of the first sixteenth of the images, s
    uniform but at least 1/20 (None without args.order_weight).

    Several tasks are dealt out in turn to the images of all processes. Two kinds of images teach a
    step to leave what is nearly clean as it is. A share 1 - args.full_share is corrupted with a
    strength s = u^2 only, u uniform in [0, 1], and weighs 1/s, at most 5: a compromise, as squared
    errors fall with s^2. And one image in args.walk_every of each task is first restored, without a
    graph, and trained from where it then is: restored images err as no corruption does, and a
    second walk would begin at one."""
    tasks, options = args.task.split(","), corruption_options(args)
    generator = make_generator(x.device, args.seed, step, RANK, 1)
    # the turn of this process's first image; hashed, so that the spare turns fall to all tasks
    first = hash((args.seed, step)) + RANK * len(x)
    mean_weight = statistics.mean(CORRUPTIONS[task][2] for task in tasks)
    x_tilde, weights, x_s = torch.empty_like(x), x.new_empty(len(x)), None
    for i in range(min(len(tasks), len(x))):
        task, own = tasks[(first + i) % len(tasks)], slice(i, None, len(tasks))
        x_tilde[own] = corrupt(x[own], task, generator, **options)
        weights[own] = CORRUPTIONS[task][2] / mean_weight
    def uniform(count):
        return torch.rand(count, 1, 1, 1, generator=generator, device=x.device)
    if args.order_weight:
        n = max(1, len(x) // 16)
        x_s = torch.lerp(x[:n], x_tilde[:n], uniform(n).clamp(min=0.05))
    s = torch.where(uniform(len(x)) < args.full_share, 1.0, uniform(len(x)).square())
    x_tilde, weights = torch.lerp(x, x_tilde, s), weights / s.flatten().clamp(min=0.2)
    walking = [i for i in range(len(x))
               if args.walk_every and (first + i) // len(tasks) % args.walk_every == 0]
    if walking:
        where = torch.tensor(walking).to(x.device, non_blocking=True)
        with autocast(x.device):
            x_tilde[where] = restore(pretrainer.model, x_tilde[where], pretrainer.log_alpha.exp(),
                                     args.num_steps)[-1]
    return x_tilde, weights, x_s

@contextlib.contextmanager
def stop_signals():
    """In here Ctrl-C and SIGTERM, by which machines are taken away, only leave a note. Gives a
    function that all processes call after each step: the signal that reached any, or 0."""
    received = [0]
    def asked_to_stop():
        latest = torch.tensor(received[-1])         # on the CPU: by gloo, and no GPU need wait
        if WORLD_SIZE > 1:
            dist.all_reduce(latest, dist.ReduceOp.MAX)
        return latest.item()
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda number, frame: received.append(number))
            stack.callback(signal.signal, number, before)
        yield asked_to_stop

def train(args, module, optimizers, crops, device, first_step):
    """Take the steps after first_step. module: a Pretrainer, or with args.finetune a Classifier."""
    # Buckets of 5 MiB are averaged while the backward pass goes on; one of the usual 25 would hold
    # a small network's gradients until its end, where compiled ones come anyway.
    wrapped = module if WORLD_SIZE == 1 else DistributedDataParallel(module, bucket_cap_mb=5)
    batches = image_batches(args, crops, device, args.batch_size, range(first_step, args.max_steps),
                            args.seed, RANK, WORLD_SIZE, args.workers)
    recent, since, images_since = [], time.perf_counter(), 0
    with stop_signals() as asked_to_stop:
        for step, (x, labels) in enumerate(batches, first_step + 1):    # 1 is the first
            inputs = (labels,) if args.finetune else corrupt_batch(args, module, x, step)
            rate = learning_rate(args, step - 1)
            recent.append(train_step(wrapped, optimizers, (x, *inputs), rate))
            images_since += args.batch_size
            log = step % LOG_EVERY == 0 or step == args.max_steps
            stop = asked_to_stop()
            save = step % args.save_every == 0 or step == args.max_steps or stop
            if log or save:
                loss, norm = check_finite(recent, step)
            if log and RANK == 0:
                record = {"step": step, "loss": loss, "gradient_norm": norm, "lr": rate,
                          "images_per_second": images_since / (time.perf_counter() - since)}
                since, images_since = time.perf_counter(), 0        # what follows takes time, too
                task = args.task.split(",")[step // LOG_EVERY % (args.task.count(",") + 1)]
                record |= {"accuracy": module.accuracy(x, labels)} if args.finetune else {
                    "task": task, "alpha": module.log_alpha.exp().item(),
                    **evaluate(module, x[:32], [task], corruption_options(args))[task]}
                log_progress(record, args)
            if log:
                recent.clear()
            if save and RANK == 0:
                save_checkpoint(args, module, optimizers, step)
            if stop:
                print0(f"\n{signal.Signals(stop).name}: saved after step {step}; "
                       "the same command goes on from there", file=sys.stderr)
                sys.exit(128 + stop)

# ---- 11. Use of the weights --------------------------------------------------------------------
# Did pretraining pay? The same loop trains a classifier; a vote among neighbours trains nothing.

LABELLED = 4096         # at most so many images vote, and as many held-out ones are classified

class Classifier(nn.Module):
    """A backbone with a linear classifier on its representation, and its loss. freeze: the backbone
    stays as it is, so that a linear probe is trained. Batch norm comes before it, as in the probes
    of masked autoencoders (He et al., 2022)."""
    def __init__(self, model, num_classes, freeze=False):
        super().__init__()
        self.model = model.requires_grad_(not freeze)
        self.model.head.requires_grad_(False)           # the energy has no part in it
        self.norm = nn.BatchNorm1d(model.head.in_features, affine=False)
        self.linear = nn.Linear(model.head.in_features, num_classes)

    def forward(self, x, labels):
        return F.cross_entropy(self.linear(self.norm(self.model.represent(x))), labels)

    @torch.no_grad()
    def accuracy(self, x, labels, chunk=64):
        self.norm.eval()                        # here the running statistics, not those of a chunk
        guess = [self.linear(self.norm(self.model.represent(y))).argmax(1) for y in x.split(chunk)]
        self.norm.train()
        return (torch.cat(guess) == labels).double().mean().item()

@torch.no_grad()
def knn_accuracy(model, x, labels, x_test, labels_test, k=10, chunk=64):
    """Share of test images whose k nearest of x, by the cosine of their representations, have the
    image's own label most often. Nothing is trained."""
    features, test = (torch.cat([F.normalize(model.represent(part)) for part in y.split(chunk)])
                      for y in (x, x_test))
    nearest = (test @ features.T).topk(min(k, len(x)), 1).indices               # (M, k)
    return (labels[nearest].mode(1).values == labels_test).double().mean().item()

def whole_images(args, crops, device, seed):
    """Up to LABELLED images (M, 3, S, S), the middle of each, and their labels (M,); of landscapes
    a quarter, since drawing them takes several times their own memory."""
    count = min(LABELLED, 2**30 // (12 * args.image_size**2))       # at most 1 GiB
    count = count // 4 if crops is None else min(count, len(crops.source))
    crops = crops and Crops(crops.source, args.image_size, augment=False)
    return next(image_batches(args, crops, device, count, [0], seed))

# ---- 12. Benchmark -----------------------------------------------------------------------------
# What does training through a gradient cost? Counted in operations, a linear layer is passed once
# forward, once by the inner gradient and four times by the gradient of both; supervised, 1 + 2.

def eager_loss(energy_fn, x, x_tilde, alpha, *_):
    """Eq. (3) for one step, as one would write it without a thought of torch.compile."""
    x_tilde = x_tilde.detach().requires_grad_() + 0         # FlopCounterMode wants no leaf here
    slope, = torch.autograd.grad(energy_fn(x_tilde).float().sum(), x_tilde, create_graph=True)
    return F.smooth_l1_loss(x_tilde - alpha * slope, x)

def benchmark(args, repetitions=10):
    """Print what training steps cost, timed side by side, all under AdamW, with one restoration
    step; return {row: median seconds}. "ops" is a row's ratio to `supervised` in operations."""
    device = set_up_device(args)
    cuda = device.type == "cuda"
    size = args.batch_size // WORLD_SIZE, 3, args.image_size, args.image_size
    x, labels = torch.rand(size, device=device), torch.zeros(size[0], dtype=int, device=device)
    pretrainer = build_pretrainer(args, x)
    energy, pretrainer.num_steps = pretrainer.model, 1
    nn.init.normal_(energy.head.weight)
    classifier = Classifier(copy.deepcopy(energy), 1000).to(device)
    classifier.norm.eval()                      # takes one image, too
    def step(module, target):
        optimizers = [torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)]
        return lambda: train_step(module, optimizers, (x, target), 0.0)
    rows = {"forward": autocast(device)(torch.no_grad()(lambda: energy(x))),
            "supervised, eager": step(classifier, labels),
            "supervised, compiled": step(torch.compile(classifier, fullgraph=True), labels)}
    for name, loss_fn in (("autograd.grad", eager_loss), ("--no-compile", energy_loss),
                          ("--compile", torch.compile(energy_loss, fullgraph=True))):
        pretrainer = copy.copy(pretrainer)      # the same parameters
        pretrainer.loss_fn = loss_fn
        rows["energy, " + name] = step(pretrainer, x.clone())
    flops, memory = {"8192^3 product": 2 * 8192**3}, {}
    for name in ("forward", "supervised, eager", "energy, autograd.grad"):
        with FlopCounterMode(display=False) as counter:
            rows[name]()
        flops[name.split(",")[0]] = counter.get_total_flops()
    for module in classifier.modules():
        if isinstance(module, Attention):       # counted before: not all fused kernels are known
            module.attend = F.scaled_dot_product_attention      # faster, no second derivative
    if cuda:            # the peak to hold the other rows' TFLOP/s against
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rows["8192^3 product, bfloat16"] = lambda: a @ a
    seconds = {name: [] for name in rows}
    for name, row in list(rows.items()) * (repetitions + 3):        # the first 3 rounds warm up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = timer()                         # waits for the GPU, then reads the clock
        row()
        seconds[name].append(timer() - start)
        memory[name] = torch.cuda.max_memory_allocated() / 2**30        # 0 without CUDA
    medians = {name: statistics.median(values[3:]) for name, values in seconds.items()}
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print0(f"{args.model}, {args.image_size} px, batch {len(x)}; {where}, torch {torch.__version__}"
           f"\n{'':<24}      ms  / supervised    ops  images/s  TFLOP/s"
           + "  peak memory  of product" * cuda)
    peak = flops["8192^3 product"] / medians.get("8192^3 product, bfloat16", 1)
    for name, value in medians.items():
        count = flops[name.split(",")[0]]
        used = f"{memory[name]:9.2f} GiB{count / value / peak:12.1%}" if cuda else ""
        print0(f"{name:<24}{value * 1e3:8.1f}{value / medians['supervised, compiled']:14.2f}"
               f"{count / flops['supervised']:7.2f}{len(x) / value:10.0f}"
               f"{count / value / 1e12:9.3f}{used}")
    return medians

# ---- 13. Command line --------------------------------------------------------------------------

FLAGS = (  # name, type (None: a switch), default or (without CUDA, with CUDA), meaning; device last
    ("--task", str, "all", f"one of {', '.join(TASKS)}, a comma list, or all"),
    ("--data", str, "procedural", "procedural (landscapes drawn on the spot), a folder of images, "
     f"or {', '.join(NAMED_DATA)} (downloaded to ./data)"),
    ("--augment", bool, True, "random crops and flips of the images; else the middle, as it is"),
    ("--model", str, ("nano", "small"), f"{', '.join(VIT_SIZES)}, or torchvision's, as resnet18"),
    ("--image-size", int, (32, 224), "side of the images in pixels"),
    ("--patch-size", int, None, "side of a ViT's patches (default: 4 below 128 pixels, else 16)"),
    ("--epochs", int, (None, 100), f"over the data; {EPOCH_OF_LANDSCAPES} landscapes are one"),
    ("--max-steps", int, (1500, None), "optimiser steps, if --epochs does not end before"),
    ("--batch-size", int, (32, 128 * WORLD_SIZE), "images per step; with CUDA 128 each process"),
    ("--lr", float, (2.4e-2, 1.5e-3), "peak learning rate at batch size 256, scaled by its root"),
    ("--weight-decay", float, 0.05, "of matrices only"),
    ("--warmup-steps", int, None, "of the learning rate (default: 1/20 of all steps)"),
    ("--num-steps", int, 1, "K, restoration steps"),
    ("--alpha", float, 256.0, "step size that restoration begins training with"),
    ("--order-weight", float, 0.002, "weight of Eq. (4), by which clean images lie lowest"),
    ("--full-share", float, 0.9, "share of images corrupted in full, the others in part"),
    ("--walk-every", int, 8, "one image in so many is trained where a first walk ends; 0: none"),
    ("--mask-ratio", float, 0.5, "mim: share of the blocks that is hidden"),
    ("--mask-grid", int, 8, "mim: blocks per side"),
    ("--sort-grid", int, 4, "sort: pieces per side"),
    ("--sr-factor", int, 4, "sr: how many times smaller"),
    ("--noise-std", float, 0.5, "denoise: standard deviation, the pixels' range being 2"),
    ("--out", str, None, "folder to write to (default: runs/TASK, runs/finetune or runs/scratch)"),
    ("--save-every", int, 500, "optimiser steps between checkpoints"),
    ("--resume", bool, True, "go on from the checkpoint in --out if there is one"),
    ("--evaluate", None, False, "train nothing: table and picture of the checkpoint in --out"),
    ("--finetune", str, None, "train a classifier: from this checkpoint.pt, or from scratch"),
    ("--freeze", None, False, "with --finetune: train a linear probe only (--lr 0.1)"),
    ("--labels", int, None, "use so many training images only (default: all)"),
    ("--benchmark", None, False, "train nothing: time training steps of --model side by side"),
    ("--compile", bool, (False, True), "torch.compile the loss with its inner gradient"),
    ("--workers", int, min(8, max(1, (os.cpu_count() or 1) // 2)), "decoders per process"),
    ("--seed", int, 0, "of all that is random"),
    ("--device", str, "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:N"))

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message + "; see --help")

def check_args(args):
    """Raise UserError at the first value that makes no sense or does not fit the others."""
    def require(holds, name, expected):
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {expected}")
    tasks = [] if args.finetune or args.benchmark else args.task.split(",")  # they corrupt nothing
    require(set(tasks) <= set(TASKS), "task", f"choose from {', '.join(TASKS)}, or all")
    models = [*VIT_SIZES, *torchvision.models.list_models(torchvision.models)]
    require(args.model in models, "model", f"choose from {', '.join(VIT_SIZES)}, or a "
            "classification model of torchvision")
    zero_too = "weight_decay warmup_steps workers seed order_weight full_share walk_every".split()
    for name, value in vars(args).items():
        if type(value) in (int, float):
            require(0 < value < 2**63 or value == 0 and name in zero_too, name,
                    f"must be {'0 or more' if name in zero_too else 'above 0'}, below 2^63")
    require(args.device in ("cpu", "cuda", *(f"cuda:{i}" for i in range(128))), "device",
            "give cpu, cuda or cuda:N")
    require(args.finetune or not args.freeze, "freeze", "is for --finetune")
    require(args.full_share <= 1, "full_share", "must be 1 or less")
    require(args.evaluate or args.batch_size % WORLD_SIZE == 0, "batch_size",
            f"must be a multiple of the {WORLD_SIZE} processes")
    require(not args.finetune or args.batch_size > WORLD_SIZE, "batch_size",
            "--finetune needs two images or more for each process")
    for name, task in (("mask_grid", "mim"), ("sort_grid", "sort"), ("sr_factor", "sr")):
        value = getattr(args, name)
        require(task not in tasks or value > 1 and args.image_size % value == 0, name,
                f"must divide the image size, {args.image_size}, and be above 1")
    blocks = args.mask_grid**2
    require("mim" not in tasks or 0 < round(args.mask_ratio * blocks) < blocks, "mask_ratio",
            f"must hide some of the {blocks} blocks and leave some")

def parse_args(argv):
    """The whole configuration: what was typed, over that of a checkpoint (all of it if --evaluate,
    the network and its data if --finetune), over the defaults for the device. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for flag, kind, default, meaning in FLAGS:
        action = {None: {"action": "store_true"}, bool: {"action": argparse.BooleanOptionalAction}}
        if default is not None and kind is not None:
            texts = default if isinstance(default, tuple) else (default,)
            texts = ("no limit" if text is None else str(text) for text in texts)
            meaning += f" (default: {'; with CUDA '.join(texts)})"
        parser.add_argument(flag, help=meaning, **action.get(kind, {"type": kind}))
    typed = vars(parser.parse_args(argv))
    on_cuda = typed.get("device", FLAGS[-1][2]).startswith("cuda")
    defaults = {flag[2:].replace("-", "_"): default[on_cuda] if isinstance(default, tuple) else
                default for flag, _, default, _ in FLAGS}
    if {"max_steps", "epochs"} & typed.keys():              # either one replaces both defaults
        defaults |= {"max_steps": None, "epochs": None}
    start, kept = typed.get("finetune"), {"model", "image_size", "patch_size", "data", "augment"}
    name = {None: typed.get("task", defaults["task"]), "scratch": "scratch"}.get(start, "finetune")
    defaults["out"] = "runs/" + name.replace(",", "-")
    if "evaluate" in typed:
        start = Path(typed.get("out", defaults["out"]), "checkpoint.pt")
        kept = defaults.keys() - FREE_FIELDS
    saved = {} if start in (None, "scratch") else load_checkpoint(start)[0]
    saved = {name: saved[name] for name in kept & saved.keys()}
    args = argparse.Namespace(**defaults | saved | typed)
    args.task = ",".join(TASKS) if args.task == "all" else args.task
    check_args(args)
    return args

def build_pretrainer(args, images):
    """The energy in its Pretrainer: weights drawn from the seed, the unused ones frozen. UserError
    with the network's own words if it does not take such images or has no second derivative."""
    torch.manual_seed(args.seed)
    try:
        model = build_model(args.model, args.image_size, args.patch_size)
        pretrainer = Pretrainer(model, args.alpha, args.num_steps, args.order_weight)
        # Batch norm becomes a fixed map of each image: the statistics of one batch, once for all.
        torch.optim.swa_utils.update_bn([images], pretrainer.to(images.device).model)
        freeze_unused(pretrainer, images[:2])
    except torch.OutOfMemoryError:
        raise
    except (ValueError, AssertionError, RuntimeError) as error:     # torchvision asserts
        raise UserError(f"--model {args.model} at {args.image_size} pixels: {error}".split("\n")[0])
    return pretrainer

def describe(args, device, pretrainer, crops):
    """Print everything that was resolved."""
    cuda = device.type == "cuda"
    counts = [f"{len(part.source)} images" if part else "drawn as needed" for part in crops]
    print0(f"""\
device    {torch.cuda.get_device_name(device) if cuda else device}, {WORLD_SIZE} process(es), \
{'bfloat16 autocast, TF32' if cuda else 'float32'}, torch {torch.__version__}
data      {args.data}; to train on: {counts[0]}; held out: {counts[1]}
model     {args.model}, {sum(p.numel() for p in pretrainer.model.parameters()):,} parameters, \
{args.image_size} px{', to be compiled' if args.compile and not args.finetune else ''}
training  {f'classifier from {args.finetune}' if args.finetune else args.task}; {args.max_steps} \
steps of {args.batch_size} images, {args.batch_size // WORLD_SIZE} per process; K = {args.num_steps}
output    {args.out}""")

def run(args):
    device = set_up_device(args)
    *crops, classes = open_data(args)
    args.num_images = EPOCH_OF_LANDSCAPES if crops[0] is None else len(crops[0].source)
    if args.epochs is not None:
        limit = max(1, args.epochs * args.num_images // args.batch_size)
        args.max_steps = min(limit, args.max_steps or limit)
    if args.warmup_steps is None:
        args.warmup_steps = args.max_steps // 20
    some_images, _ = next(image_batches(args, crops[0], device, 32, [0], seed=-5))
    module = build_pretrainer(args, some_images)
    describe(args, device, module, crops)
    if args.finetune:
        if args.finetune != "scratch":
            load_checkpoint(args.finetune, module)
            args.finetune_crc = zlib.crc32(Path(args.finetune).read_bytes())    # for `resume`
        if RANK == 0:
            test = whole_images(args, crops[1], device, seed=-2)
            knn = knn_accuracy(module.model, *whole_images(args, crops[0], device, seed=-4), *test)
        module = Classifier(module.model, classes, args.freeze).to(device)
    if args.evaluate:
        then, _ = load_checkpoint(Path(args.out, "checkpoint.pt"), module)
        count = then.get("num_images")
        if (args.data, args.labels) == (then.get("data"), then.get("labels")) \
                and args.num_images != count:
            print0(f"warning: {args.data} had {count} images to train on, now {args.num_images}: "
                   "some that are held out now were not then", file=sys.stderr)
    else:
        optimizers = build_optimizers(module, args.weight_decay)
        first_step = resume(args, module, optimizers)
        if args.compile and not args.finetune and first_step < args.max_steps:
            size = args.batch_size // WORLD_SIZE, 3, args.image_size, args.image_size
            try_compile(args, module, torch.zeros(size, device=device))
        train(args, module, optimizers, crops[0], device, first_step)
    metrics = {}
    if RANK == 0:
        if args.finetune:
            metrics = {"knn": knn, "accuracy": module.accuracy(*test)}
            print(f"\n{metrics['accuracy']:.1%} of {len(test[0]):,} held-out images are classified "
                  f"right; before training, by a vote of 10 nearest neighbours, {knn:.1%}")
        else:
            images, _ = next(image_batches(args, crops[1], device, HELD_OUT, [0], seed=-2))
            tasks, options = args.task.split(","), corruption_options(args)
            metrics = evaluate(module, images, tasks, options)
            print_table(metrics, args.num_steps)
            picture = draw_picture(module, images[:8], tasks, options)
            write_file(args, "restorations.png", lambda file: picture.save(file, "png"))
        write_file(args, "metrics.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return metrics

def main(argv=None):
    """Do as the command line says; return {task: {metric: value}}, see `evaluate`, after
    --finetune {"knn", "accuracy"} (under torchrun on rank 0), or what `benchmark` returns. A
    mistake of the user's is one line on stderr and SystemExit(2)."""
    try:
        args = parse_args(argv)
        return benchmark(args) if args.benchmark else run(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, RuntimeError, MemoryError, OSError) as error:
        said = str(error)
        if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                or re.search("can't allocate memory|size calculation overflowed", said)):   # CPU
            error = "out of memory; a smaller --batch-size, --image-size or --model would fit"
        elif "DataLoader worker" in said:       # killed, or without shared memory
            error = f"a decoder failed ({said.splitlines()[-1]}); try fewer --workers, or 0"
        elif "No working C++ compiler" in said:
            error = "to compile needs a C++ compiler, such as g++"
        elif "Connection closed by peer" in said:           # gloo's words
            error = "another process has ended"
        elif not isinstance(error, (UserError, OSError)):
            raise
        if RANK:        # rank 0 speaks for all; these only if torchrun does not end them first
            time.sleep(20)
        print("energy_pretrain.py: error:", *str(error).split(), file=sys.stderr, flush=True)
        sys.exit(2)

if __name__ == "__main__":
    try:
        main()
    finally:        # Python would end decoders by SIGTERM, which they ignore, and wait for them
        for decoder in multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would object
            decoder.kill()
