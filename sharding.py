"""
Networks too large for one GPU: parameters, gradients and Adam's moments shared among the processes, by PyTorch's
FSDP (fully_shard). A checkpoint is the same file as without: it is whole, and process 0 writes it.
"""

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network):
    """Shares a network's parameters among the processes, block by block: a block is whole only while it computes."""
    for block in network.blocks:
        fully_shard(block)
    return fully_shard(network, reshard_after_forward=True)  # else a changed average keeps its old parameters


def whole(state, keep=True):
    """A tensor, or nested dicts of them, without shards. All processes call it; keep: whether this one keeps the
    result, on the CPU, or only sends its shards. What has no shards stays as it is."""
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if keep else None


def like(tensor, parameter):
    """A whole tensor as shards, as the parameter's are."""
    if not isinstance(parameter, DTensor) or tensor.ndim == 0:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def spread(checkpoint, network):
    """Makes shards of the networks and the optimiser's moments in a checkpoint, as the network's are, if they are."""
    parameters = dict(network.named_parameters())
    for part in ("model", "ema"):
        checkpoint[part] = {name: like(value, parameters[name]) for name, value in checkpoint[part].items()}
    moments = checkpoint["optimizer"]["state"]
    for i, parameter in enumerate(parameters.values()):
        moments[i] = {key: like(value, parameter) for key, value in moments.get(i, {}).items()}
