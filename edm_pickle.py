"""
Reads the networks that EDM published (Karras et al. 2022), without running them.

Such a file, edm-imagenet-64x64-cond-adm.pkl for instance, is a pickle: a program that may call any function of Python. EDM's own
loader also executes the source code that is in it. Here every name that the program may refer to becomes an inert record of
what the file wants done with it, but for OrderedDict; any other name is refused. Nothing else is called, and what tensors
there are is read off the records afterwards.
"""

import io
import pickle
from collections import OrderedDict

import torch

from configurator import UserError, require

NAMES = {  # all that EDM's files refer to
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
    """A call, or an object, that the file asks for: the arguments, and the state to give it. Each name has a class of its own."""

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
    """A parameter, as it was pickled: a record of a tensor, of a storage, of bytes that are a torch file. -> Tensor"""
    if is_call(record, "torch._utils._rebuild_parameter"):
        record = record.args[0]
    expect(is_call(record, "torch._utils._rebuild_tensor_v2"), f"a {type(record).__name__} where a tensor should be")
    storage, offset, size, stride = record.args[:4]
    expect(is_call(storage, "torch.storage._load_from_bytes") and isinstance(storage.args[0], bytes),
           "a tensor without a storage")
    expect(not storage.args[0].startswith(b"PK"), "a storage in a zip file")  # where a few bytes may unpack to many
    if storage.loaded is None:  # once, however many tensors share it
        storage.loaded = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    whole = torch.empty(0, dtype=storage.loaded.dtype).set_(storage.loaded)
    tensor = whole.as_strided(size, stride, offset)  # which checks the bounds
    expect(tensor.is_floating_point() and tensor.numel() <= whole.numel(), "a tensor that is larger than its storage")
    return tensor


def fields_of(module):
    """-> the __dict__ of a module, be it one of EDM's or a ModuleDict."""
    if is_call(module, "torch.nn.modules.container.ModuleDict"):
        return module.state
    expect(is_call(module, "torch_utils.persistence._reconstruct_persistent_obj"),
           f"a {type(module).__name__} where a module should be")
    return module.args[0]["state"]


def require_class(module, name, of):
    """Raises UserError unless the module is of this class, one of EDM's."""
    is_one = is_call(module, "torch_utils.persistence._reconstruct_persistent_obj")
    found = module.args[0]["class_name"] if is_one else type(module).__name__
    found = found if str(found).isidentifier() else "stranger"
    require(found == name, f"its {of} is a {found}; only ADM's (DhariwalUNet) with EDM's preconditioning (EDMPrecond) fits")


def parameters_of(module, prefix, found, seen):
    """Adds the parameters of a module and those inside it to `found`, under PyTorch's names."""
    expect(id(module) not in seen, "a module that is in it twice")
    seen.add(id(module))
    fields = fields_of(module)
    for name, parameter in fields["_parameters"].items():
        if parameter is not None:
            found[prefix + name] = tensor_of(parameter)
    for name, child in fields["_modules"].items():
        if child is not None:
            parameters_of(child, f"{prefix}{name}.", found, seen)


def read_edm(path):
    """The averaged network `ema` of a file that EDM published -> its parameters, {"model.enc.64x64_conv.weight": Tensor, ...}, and sigma_data.

    Raises UserError where the file can't be read, refers to anything that EDM's files do not, or has another network, or
    another preconditioning, which it names.
    """
    try:
        with open(path, "rb") as file:
            network = Unpickler(file).load()["ema"]
        fields = fields_of(network)
        require_class(network, "EDMPrecond", "preconditioning")
        sigma_data = float(fields["sigma_data"])
        found = {}
        parameters_of(network, "", found, set())
        require_class(fields["_modules"]["model"], "DhariwalUNet", "network")
        return found, sigma_data
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # whatever a broken file makes the unpickler raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is not one of EDM's networks, or damaged ({what})") from None
