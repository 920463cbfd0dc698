"""The SEDD prior of config/imagenet64.py. The sizes and the optimisation (batch 512, 3e-4, 2,500 steps of warm-up, no
weight decay) are those of Lou et al.'s (2024) small network; label_drop and how long to train are our guess."""
out_dir = "out/imagenet64"
prior = "sedd"
layers = 12
dim = 768
heads = 12
total_images = 200_000_000
batch_size = 512
lr = 3e-4
warmup_images = 1_280_000
log_every = 10_000_000
save_every = 10_000_000
