"""The networks of compare_processes.py, which trains twenty of them for a seed: those of finetune.py with half the
channels, in batches half as large, and with 40,000 images in the encoder's first phase, as by default.

    python compare_processes.py
"""
out_dir = "out/processes"
class_cond = False
model_channels = 8
coarse_images = 40_000
batch_size = 16
ema_rampup = 0.05
log_every = 5_000
save_every = 12_000
preview_every = 0
