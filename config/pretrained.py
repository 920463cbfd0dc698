"""The model in pretrained/, larger than the default: 24, 48, 48 channels instead of 16, 16, 64, two
blocks per level instead of one, a longer first phase, and a run ten times as long.

    python train_stage1.py config/pretrained.py
    python train_prior.py --out_dir=out/pretrained
    python -c "import trained; trained.ship('out/pretrained', 'pretrained')"
"""
out_dir = "out/pretrained"
model_channels = 24
channel_mult = (1, 2, 2)
num_blocks = 2
coarse_images = 200_000
total_images = 200_000
batch_size = 32
ema_rampup = 0.05
save_every = 10_000
preview_every = 100_000
