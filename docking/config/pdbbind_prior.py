"""The prior on PDBBind: the denoiser's layers are held for the first five epochs (App. E.4)."""
out_dir = "out/pdbbind"
total_poses = 1_600_000
held_poses = 82_000
batch_size = 16
lr = 1e-3
log_every = 16_000
save_every = 160_000
