"""The model in pretrained-dlc/: config/dlc.py's codes, and the network of config/pretrained.py, without class labels.

    python train_encoder.py
    python train_stage1.py config/pretrained_dlc.py
    python train_prior.py config/dlc_sedd_prior.py --dim=120 --out_dir=out/pretrained-dlc
    python -c "import trained; trained.ship('out/pretrained-dlc', 'pretrained-dlc')"
"""
out_dir = "out/pretrained-dlc"
class_cond = False
codes = "out/dlc"
model_channels = 24
channel_mult = (1, 2, 2)
num_blocks = 2
total_images = 200_000
batch_size = 32
ema_rampup = 0.05
save_every = 10_000
preview_every = 100_000
