"""The autoregressive prior for config/dlc.py. 9,500 codes of 64 numbers are few: it overfits after about 600 steps
of 250 codes, so it ends there."""
out_dir = "out/dlc"
layers = 4
dim = 128
heads = 4
total_images = 150_000
batch_size = 250
lr = 1e-3
log_every = 10_000
save_every = 50_000
