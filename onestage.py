"""
One stage in place of two: a prior that trains along with stage 1 (DisCo-Diff sec. 5, which names it as future work).

    python train_stage1.py --prior=ar && python sample.py
    python train_stage1.py config/joint.py && python sample.py --out_dir=out/joint

After each step of stage 1 the prior takes one of train_prior.py's, on a batch of its own: codes of the averaged
encoder, which is the one that stays. Where the encoder moves (encoder_lr > 0), it runs anew for each batch. No gradient
comes back, so stage 1 is, to the bit, what it is without a prior. The prior takes as many steps as stage 1, whatever
total_images its --prior_config has.

The joint form has a kld_weight: stage 1's loss gets KL(q(z | y) | p(z | c)), the nats that an image's codes tell beyond
what the averaged prior p expects, and the encoder learns codes that are easier to predict. kld_weight = 0 is the paper.
Too large a weight makes the codes say nothing: watch `bits`.

stage1.pt has all that both need to go on. prior_KIND.pt is written just before it, for sample.py: a crash between the
two is mended by the same command.
"""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import train_prior
import training
from checkpoint import weights_checksum
from configurator import configure, require
from encoded import Encoded
from model import draw_codes, gumbel_softmax
from run import progress
from trained import require_fit

OF_STAGE_1 = ("out_dir", "prior", "seed", "device", "precision", "loss_scale")  # settings that the prior shares with it


def rate(prior, logits, gumbel, tau, labels):
    """KL(q(z_i | y) | p(z_i | z_<i, c)) of each latent in nats, (B, m), with z_<i drawn from q = softmax(logits)

    Over the draws, the mean of a row's sum is KL(q(z | y) | p(z | c)) exactly. The gradient reaches the logits through
    q, and through z_<i by way of its relaxation (straight-through). prior: a `Prior`; logits, gumbel: (B, m, k)
    """
    soft = gumbel_softmax(logits, tau, gumbel)
    z = F.one_hot(draw_codes(logits, gumbel), logits.shape[2]) + (soft - soft.detach())
    log_q, log_p = logits.log_softmax(-1), prior(z, labels).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(2)


def check(config):
    """Raises UserError for settings of train_stage1.py that don't fit each other."""
    prior, weight, continuous, m = (config[name] for name in ("prior", "kld_weight", "continuous", "num_latents"))
    require(m or not prior, f"--prior={prior} draws codes: with num_latents=0 there are none")
    require(prior or not config["prior_config"], "--prior_config has the settings of --prior=: say which, ar or sedd")
    require(weight or not continuous or not m, "continuous latents need a --kld_weight above 0: the larger, the less "
            "they tell of an image; config/continuous.py has one")
    joint = prior == "ar" and config["encoder_lr"] > 0 and not config["codes"]
    require(joint or continuous or not weight, "--kld_weight needs --continuous=True; or, for codes, --prior=ar and an "
            "encoder that goes on learning: --encoder_lr above 0, and no --codes")


def prepare(run):
    """-> the prior's run, as train_prior.py has it, before its first step; its settings go into run.config, with which
    those of a run that continues are compared. Raises UserError for settings that don't fit."""
    config, hook = run.config, sys.excepthook
    arguments = [f"--batch_size={config['batch_size']}", *filter(None, [config["prior_config"]])]
    settings = configure(vars(train_prior), [*arguments, *(f"--{name}={config[name]}" for name in OF_STAGE_1)])
    sys.excepthook = hook  # else a lack of memory would be blamed on train_prior.py's settings
    train_prior.check(settings)
    require_fit(config["prior"], run.model_args, "this run")
    batch = settings["batch_size"]
    require(batch % run.world == 0,
            f"the prior's batch_size {batch} can't be shared among {run.world} processes equally")
    config |= {f"prior_{name}": value for name, value in settings.items()
               if name not in (*OF_STAGE_1, *train_prior.FREE)}
    settings["total_images"] = batch * -(-config["total_images"] // config["batch_size"])
    path = f"{config['out_dir']}/prior_{config['prior']}"
    prior = SimpleNamespace(**vars(run) | dict(
        config=settings, made_by="train_prior", path=f"{path}.pt", log=f"{path}.jsonl", curves=f"{path}_curves.png",
        local_batch=batch // run.world, lower="lr in --prior_config", stage1=run.ema, flips=2 if config["xflip"] else 1,
        carries={}, skipped=torch.zeros(2, device=run.device), step=0))
    train_prior.build(prior)
    prior.parameters, prior.ema_parameters = list(prior.model.parameters()), list(prior.ema.parameters())
    return prior


def begin(run):
    """What the prior needs before its first step, or its next; once the encoder's first phase is over."""
    prior, still = run.prior, run.config["encoder_lr"] == 0
    prior.began = prior.step
    training.reset(prior)
    prior.forward = training.distributed(prior, prior.model.train())
    prior.encoded = run.encoded or Encoded(prior, run.ema, prior.flips, still * train_prior.cache_gb * 2 ** 30)
    if run.master:
        prior.carries["encoder"] = weights_checksum(run.ema.state_dict())
        training.open_log(prior, "codes")
    batch, total = prior.config["batch_size"], prior.config["total_images"]
    prior.bar = progress(total=total, initial=prior.step * batch, unit="img", desc=f"prior {run.config['prior']}",
                         disable=not run.master, mininterval=1)


def advance(run):
    """The prior's step that follows a step of stage 1."""
    train_prior.advance(run.prior, run.prior.bar)


def save(run):
    """Process 0 writes the prior's checkpoint. -> what stage 1's needs of it, to be written next"""
    prior = run.prior
    prior.carries["encoder"] = weights_checksum(run.ema.state_dict())
    training.save(prior)
    return dict(prior=training.state_of(prior))


def finish(run, finished):
    """Draws the prior's curves, and says how well it predicts held-out codes if training is finished."""
    run.prior.bar.close()
    if run.master:
        if finished:
            train_prior.print_bits(run.prior)
        if run.prior.step > run.prior.began:
            training.draw_curves(run.prior)
