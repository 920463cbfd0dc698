"""The SEDD prior for config/dlc.py. It sees each code under ever new masks, and so overfits later than the
autoregressive one."""
out_dir = "out/dlc"
prior = "sedd"
layers = 4
dim = 128
heads = 4
total_images = 375_000
batch_size = 250
lr = 1e-3
log_every = 25_000
save_every = 125_000
