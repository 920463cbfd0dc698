"""ImageNet-64 with group-hierarchical latents (sec. 3.3, 4.1): 3 groups of 10, heard at 8, 16 and 32 pixels of the
up-sampling branch. All else is as in config/imagenet64_finetune.py, since the paper names no other settings.

    python data.py imagenet64 --source=ILSVRC/Data/CLS-LOC/train --resolution=64
    curl -O https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet64_hierarchical.py
    torchrun --nproc_per_node=8 train_prior.py config/imagenet64_prior.py --out_dir=out/imagenet64_hierarchical
    torchrun --nproc_per_node=8 train_prior.py config/imagenet64_sedd_prior.py --out_dir=out/imagenet64_hierarchical
    python compare_groups.py --runs=out/imagenet64_hierarchical --out_dir=out/imagenet64_hierarchical
"""
out_dir = "out/imagenet64_hierarchical"
init_from = "edm-imagenet-64x64-cond-adm.pkl"
dataset = "imagenet64"
held_out = 5_000
# denoiser: EDM's, 295.9 M parameters
model_channels = 192
channel_mult = (1, 2, 3, 4)
channel_mult_emb = 4
num_blocks = 3
attn_resolutions = (32, 16, 8)
dropout = 0.1
# discrete latents
num_latents = 30
groups = 3  # of 10
codebook_size = 100
tau = 1.0
null_prob = 0.1
latent_dim = 192
latent_layers = 6
latent_heads = 3
latents_to_emb = False
# encoder: ViT-B/8
encoder_patch = 8
encoder_dim = 768
encoder_layers = 12
encoder_heads = 12
coarse_images = 0
# optimisation
total_images = 200_000_000
batch_size = 4096
batch_gpu = 128
lr = 1e-4
encoder_lr = 1e-4
warmup_images = 10_000_000
ema_halflife_images = 50_000_000
ema_rampup = 0.05
P_mean = -1.2
P_std = 1.2
sigma_data = 0.5
# reports
log_every = 200_000
save_every = 5_000_000
preview_every = 10_000_000
