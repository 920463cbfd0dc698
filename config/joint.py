"""One stage in place of two, the joint form (onestage.py): on the embedded data; or with the settings of a file before
it, as in `config/imagenet64.py config/joint.py --prior_config=config/imagenet64_prior.py --out_dir=out/imagenet64-joint`.

    python train_stage1.py config/joint.py
    python sample.py --out_dir=out/joint

With kld_weight = 0.0 the prior follows an encoder that it does not influence. The encoder goes on learning after its
first phase, slowly: a fast one collapses.
"""
out_dir = "out/joint"
prior = "ar"
kld_weight = 1.0
encoder_lr = 1e-4
