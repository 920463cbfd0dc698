"""PDBBind with the paper's sizes (App. E.4, E.5), without language-model features.

    python docking/data.py --source=PDBBind --name=pdbbind --ids=timesplit_no_lig_overlap_train
    python docking/data.py --source=PDBBind --name=pdbbind-test --ids=timesplit_test
    torchrun --nproc_per_node=2 docking/train.py docking/config/pdbbind.py
    torchrun --nproc_per_node=2 docking/train_prior.py docking/config/pdbbind_prior.py
    python docking/dock.py docking/config/pdbbind_dock.py --dataset=pdbbind-test

PDBBind's licence does not let it be passed on: get your own copy. About 850 epochs; the paper's run took
nine days on two GPUs.
"""
out_dir = "out/pdbbind"
dataset = "pdbbind"
num_latents = 2
scalars = 24
vectors = 6
layers = 5
encoder_vectors = 4
encoder_layers = 3
channelwise = False
dropout = 0.1
label_size = 1.0
tau = 1.0
null_prob = 0.1
total_poses = 14_000_000
batch_size = 24
lr = 1e-3
encoder_lr = 1e-3
warmup_poses = 0
ema_decay = 0.999
log_every = 16_000
save_every = 160_000
