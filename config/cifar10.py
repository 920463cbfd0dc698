"""CIFAR-10 at 32 x 32 on one GPU. The papers have no such run: these settings lie between the small
default and ImageNet-64's, and still need tuning.

    python data.py cifar10
    python train_stage1.py config/cifar10.py
    python train_prior.py config/cifar10_prior.py
    python sample.py --out_dir=out/cifar10
"""
out_dir = "out/cifar10"
dataset = "cifar10"
held_out = 1_000
xflip = True
model_channels = 128
channel_mult = (1, 2, 2)
num_blocks = 3
attn_resolutions = (16, 8)
dropout = 0.1
num_latents = 10
codebook_size = 100
latent_dim = 192
latent_heads = 3
encoder_patch = 4
encoder_dim = 384
encoder_layers = 8
encoder_heads = 6
coarse_images = 2_000_000
total_images = 50_000_000
batch_size = 512
batch_gpu = 512
lr = 5e-4
encoder_lr = 0.0
warmup_images = 1_000_000
ema_halflife_images = 500_000
ema_rampup = 0.05
P_mean = -1.2
P_std = 1.2
log_every = 51_200
save_every = 1_000_000
preview_every = 2_500_000
