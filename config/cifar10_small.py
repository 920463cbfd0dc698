"""Plain EDM on CIFAR-10, small enough for a laptop: 8.0 M parameters, 64 x (1, 2, 2) channels. The
settings are our guess, not tuned.

    python data.py cifar10
    python train_stage1.py config/cifar10_small.py
"""
out_dir = "out/cifar10_small"
dataset = "cifar10"
held_out = 1_000
class_cond = False
xflip = True
model_channels = 64
channel_mult = (1, 2, 2)
num_blocks = 2
attn_resolutions = (16, 8)
dropout = 0.1
num_latents = 0
total_images = 5_000_000
batch_size = 128
batch_gpu = 128
lr = 1e-3
warmup_images = 100_000
ema_halflife_images = 500_000
ema_rampup = 0.05
P_mean = -1.2
P_std = 1.2
log_every = 10_240
save_every = 102_400
preview_every = 512_000
