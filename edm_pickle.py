"""
Reads the networks that EDM published (Karras et al. 2022), without running anything in their files.

Such a file (edm-imagenet-64x64-cond-adm.pkl, say) is a pickle: a program that may call any Python
function. EDM's own loader also executes source code in it. Here, each name that EDM's files use,
except OrderedDict, becomes an inert record of what the file asks for; any other name is refused. The
tensors are then read off the records.
"""

import io
import pickle
from collections import OrderedDict

import torch

from configurator import UserError, require

NAMES = {  # all that EDM's files refer to, besides OrderedDict
    "torch_utils.persistence._reconstruct_persistent_obj",  # a module: its class's name and source, and its __dict__
    "torch.nn.modules.container.ModuleDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
}


class Record:
    """A call or object that the file asks for: its arguments, its state. Each name has a subclass."""

    state = loaded = None

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file)
        self.classes = {"collections.OrderedDict": OrderedDict}

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name in NAMES:
            self.classes.setdefault(name, type(name, (Record,), {}))
        if name not in self.classes:
            raise UserError(f"it refers to {name}, which EDM's networks do not; nothing in it was run")
        return self.classes[name]


def expect(condition, what):
    if not condition:
        raise ValueError(what)


def is_call(record, name):
    return type(record).__name__ == name


def tensor_of(record):
    """A pickled parameter, a record of a tensor, of a storage, of a torch file's bytes -> Tensor"""
    if is_call(record, "torch._utils._rebuild_parameter"):
        record = record.args[0]
    expect(is_call(record, "torch._utils._rebuild_tensor_v2"),
           f"a {type(record).__name__} where a tensor should be")
    storage, offset, size, stride = record.args[:4]
    expect(is_call(storage, "torch.storage._load_from_bytes") and isinstance(storage.args[0], bytes),
           "a tensor without a storage")
    expect(not storage.args[0].startswith(b"PK"), "a storage in a zip file")  # a few bytes may unpack to many
    if storage.loaded is None:  # only once: tensors may share it
        storage.loaded = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    whole = torch.empty(0, dtype=storage.loaded.dtype).set_(storage.loaded)
    tensor = whole.as_strided(size, stride, offset)  # checks the bounds
    expect(tensor.is_floating_point() and tensor.numel() <= whole.numel(),
           "a tensor that is larger than its storage")
    return tensor


def fields_of(module):
    """-> the __dict__ of one of EDM's modules, or of a ModuleDict."""
    if is_call(module, "torch.nn.modules.container.ModuleDict"):
        return module.state
    expect(is_call(module, "torch_utils.persistence._reconstruct_persistent_obj"),
           f"a {type(module).__name__} where a module should be")
    return module.args[0]["state"]


def require_class(module, name, of):
    """Raises UserError unless the module, the network's `of`, has EDM's class `name`."""
    is_edms = is_call(module, "torch_utils.persistence._reconstruct_persistent_obj")
    actual = module.args[0]["class_name"] if is_edms else type(module).__name__
    actual = actual if str(actual).isidentifier() else "stranger"
    require(actual == name,
            f"its {of} is a {actual}; only ADM's (DhariwalUNet) with EDM's preconditioning (EDMPrecond) fits")


def parameters_of(module, prefix, parameters, seen):
    """Adds the parameters of a module and of its submodules to `parameters`, under PyTorch's names."""
    expect(id(module) not in seen, "the same module twice")
    seen.add(id(module))
    fields = fields_of(module)
    for name, parameter in fields["_parameters"].items():
        if parameter is not None:
            parameters[prefix + name] = tensor_of(parameter)
    for name, child in fields["_modules"].items():
        if child is not None:
            parameters_of(child, f"{prefix}{name}.", parameters, seen)


def read_edm(path):
    """Reads `ema`, the averaged network, from a file that EDM published.

    -> its parameters, {"model.enc.64x64_conv.weight": Tensor, ...}, and sigma_data
    Raises UserError if the file can't be read, refers to a name that EDM's files do not, or has another
    network or preconditioning, which the message names.
    """
    try:
        with open(path, "rb") as file:
            network = Unpickler(file).load()["ema"]
        fields = fields_of(network)
        require_class(network, "EDMPrecond", "preconditioning")
        sigma_data = float(fields["sigma_data"])
        parameters = {}
        parameters_of(network, "", parameters, set())
        require_class(fields["_modules"]["model"], "DhariwalUNet", "network")
        return parameters, sigma_data
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # a broken file can make the unpickler raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is not one of EDM's networks, or damaged ({what})") from None
