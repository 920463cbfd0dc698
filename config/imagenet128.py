"""ImageNet-128, class-conditional: the paper's U-ViT (App. D.1, Table 5) with VDM++'s noise levels and weights.

    python data.py imagenet128 --source=ILSVRC/Data/CLS-LOC/train --resolution=128
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet128.py --num_latents=0 --out_dir=out/imagenet128_plain
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet128.py --init_from=out/imagenet128_plain
    torchrun --nproc_per_node=8 train_prior.py config/imagenet64_prior.py --out_dir=out/imagenet128
    torchrun --nproc_per_node=8 sample.py --out_dir=out/imagenet128 --num_images=50000 --per_code=1 --batch_size=32 \
        --num_steps=58 --correct_with=out/imagenet128_plain --correct_steps=376

The second line trains the plain model, to which the third adds codes, as in the paper. Training is as for ImageNet-64.
The last line is the correction of Table 2: DisCo-Diff's ODE down to a noise level of 10, DDPM's sampler and the plain
model from there. The paper says 414 evaluations in all, and no more: 38 + 376 is our way to share them out, and DDPM's
noise levels and variance are chosen here, too. Without its last two settings, it is the ODE alone, in 115 evaluations;
the paper's table says 114.

Open in the paper, and chosen here: what uvit.py says; 3 blocks on each level; dropout; noise levels from a fixed
distribution (VDM++ adapts it to the loss as training goes on); that the shift moves weights and levels alike, and
sigma_data stays 0.5; that sampling starts from 80 all the same (simple diffusion would shift this, to 160). The
weight's plateau begins at 10.45, just above the noise level 10 at which the correction takes over.

Computed, not measured: weights, gradients, Adam and the average take 56 GB in each process, 24 bytes for each of 2.34
billion parameters, four of which are DDP's buckets, beside which gradients accumulate over parts of a batch; and
bfloat16 copies of the weights up to 4.5 GB. With `recompute`, what one image needs more is estimated at 0.15 GB;
without it, 4 GB. Where 80 GB are not enough there is no other way here: stage 1 has DDP, and FSDP is train_text.py's.
"""
out_dir = "out/imagenet128"
dataset = "imagenet128"
held_out = 5_000
# denoiser: EDM's blocks at 128, 64 and 32 pixels, 36 layers of width 2048 at 16
denoiser = "uvit"
model_channels = 128
channel_mult = (1, 2, 4, 16)
channel_mult_emb = 4
num_blocks = 3
attn_resolutions = (64, 32)  # Table 5 has 16, too: the Transformer
depth = 36
dropout = 0.1
recompute = True
# discrete latents
num_latents = 10
codebook_size = 100
tau = 1.0
null_prob = 0.1
latent_dim = 192
latent_layers = 6
latent_heads = 3
latents_to_emb = False
# encoder: ViT-B/16
encoder_patch = 16
encoder_dim = 768
encoder_layers = 12
encoder_heads = 12
coarse_images = 0
# optimisation
total_images = 2_500_000_000
batch_size = 4096
batch_gpu = 32
lr = 1e-4
encoder_lr = 1e-4
warmup_images = 10_000_000
ema_halflife_images = 50_000_000
ema_rampup = 0.05
P_mean = -1.2
P_std = 1.2
weighting = "edm-monotonic"
shift = 2.0  # from 64 pixels to 128
sigma_data = 0.5
# reports
log_every = 200_000
save_every = 5_000_000
preview_every = 10_000_000
