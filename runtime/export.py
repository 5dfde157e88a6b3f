"""--export: a network and what it needs as one file that torch.export.load reads."""

import json

import torch
import torch.nn as nn

from runtime import checkpoint


class ExportedNetwork(nn.Module):
    """An Exported as a module with the network's weights: {input: tensor} -> float32."""

    def __init__(self, network, forward):
        super().__init__()
        self.network, self.compute = network, forward

    def forward(self, inputs):
        return self.compute(inputs).float()


def trace(module, tensors):
    """torch.export of a module that takes one dictionary of tensors; a side that is a word is free.

    Errors: ValueError for an operation that this torch cannot trace with free sides, such as the
            FFT of bidmc_rr in torch 2.4 and 2.5
    """
    sides = [side for tensor in tensors.values() for side in tensor["shape"]]
    words = list(dict.fromkeys(side for side in sides if isinstance(side, str)))
    free = {word: torch.export.Dim(word) for word in words}
    length = {word: 2 + i for i, word in enumerate(words)}  # 0 and 1 would be taken for constants
    example, dynamic = {}, {}
    for name, tensor in tensors.items():
        shape = [length.get(side, side) for side in tensor["shape"]]
        example[name] = torch.zeros(shape, dtype=getattr(torch, tensor["type"]))
        dynamic[name] = {i: free[side] for i, side in enumerate(tensor["shape"]) if side in free}
    try:
        return torch.export.export(module, (example,), dynamic_shapes=(dynamic,), strict=False)
    except torch._subclasses.fake_tensor.UnsupportedOperatorException as error:
        raise ValueError(f"torch {torch.__version__} cannot export {error}, which this network "
                         "uses: take a later torch") from error


def write_export(model, task, args, facts):
    """Write the network to --out, with about.json, which describes it, and print how to use it."""
    exported = task.export(model.eval().requires_grad_(False), args, facts)
    tensors = {}
    for name, (kind, shape, text) in exported.inputs.items():
        tensors[name] = {"type": kind, "shape": shape, "is": text}
    output, shape, text = exported.output
    about = {"task": args.task, "variant": args.variant, "inputs": tensors,
             "output": {output: {"type": "float32", "shape": shape, "is": text}},
             "facts": exported.facts, "torch": torch.__version__,
             "recipe": {name: getattr(args, name) for name in task.flags}}
    program = trace(ExportedNetwork(model, exported.forward), tensors)
    with checkpoint.atomic_write(args.out, "wb") as file:
        torch.export.save(program, file, extra_files={"about.json": json.dumps(about, indent=1)})
    for name, tensor in (tensors | about["output"]).items():
        print(f"{name}: {tensor['type']} ({', '.join(map(str, tensor['shape']))}), {tensor['is']}")
    arguments = ", ".join(f"{name!r}: {name}" for name in tensors)
    print(f"saved in {args.out}; to use it, without this script:\n    import torch\n    model = "
          f"torch.export.load({args.out!r}).module()\n    {output} = model({{{arguments}}})")
