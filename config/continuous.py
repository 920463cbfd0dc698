"""Continuous latents in place of codes (continuous.py): on the embedded data; or with the settings of a file before it,
as in `config/imagenet64.py config/continuous.py --kld_weight=0.1 --out_dir=out/imagenet64-continuous`.

    python train_stage1.py config/continuous.py
    python train_prior.py --prior=diffusion --out_dir=out/continuous
    python sample.py --prior=diffusion --out_dir=out/continuous
"""
out_dir = "out/continuous"
continuous = True
kld_weight = 1.0
