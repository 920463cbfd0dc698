"""The model in pretrained/: 24, 48, 48 channels where the default has 16, 16, 64, two blocks a level instead of one, and
four times as many images.

    python train_stage1.py config/pretrained.py
    python train_prior.py --out_dir=out/pretrained
    python -c "import trained; trained.ship('out/pretrained', 'pretrained')"
"""
out_dir = "out/pretrained"
model_channels = 24
channel_mult = (1, 2, 2)
num_blocks = 2
total_images = 120_000
save_every = 10_000
preview_every = 50_000
