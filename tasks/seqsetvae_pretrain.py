"""seqsetvae --mode pretrain: a set VAE that rebuilds the sets of a stay from its history.

    python train.py --task seqsetvae --variant pretrain --out runs/stays-pretrain
    python train.py --task seqsetvae --mode finetune --pretrained runs/stays-pretrain
"""

import dataclasses
import functools
import math

import torch

import losses
import models
from tasks import seqsetvae, seqsetvae_data
from tasks.common import no_predictions, outputs_over

VARIABLES = len(seqsetvae_data.STAY_VARIABLES)


def network(args, facts):
    return models.SeqSetVAE(seqsetvae.encoder(args), seeds=facts["largest_set"])


def per_stay(output, inputs, args):
    """Errors of each stay: {name: (b,)}.

    recon    mean Chamfer distance of its sets; kl: mean KL divergence of its sets
    decoded  number of events whose variable is decoded; events: number of its events
    """
    lengths = inputs["lengths"]
    recon, decoded, order = [], [], []
    for chunk in output["sets"]:
        guess, target, mask = chunk["guess"], chunk["target"], chunk["mask"]
        recon.append(losses.chamfer(guess, target, x_mask=mask, y_mask=mask))
        decoded.append(decoded_events(guess.detach(), target, mask))
        order.append(chunk["sets"])
    order = torch.cat(order).argsort()  # the chunks hold sets of one size
    recon, decoded = torch.cat(recon)[order], torch.cat(decoded)[order]
    kl = losses.kl_to_standard_normal(output["mu"], output["logvar"], free_bits=args.free_bits)
    stay = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def total(values):
        return values.new_zeros(len(lengths)).index_add(0, stay, values)

    return {"recon": total(recon) / lengths, "kl": total(kl) / lengths, "decoded": total(decoded),
            "events": total(inputs["sizes"])}


def decoded_events(guess, target, mask):
    """Number of events of each set whose nearest guess has their variable as its largest entry."""
    costs = losses.set_costs(guess.float(), target).masked_fill(~mask[:, :, None], math.inf)
    decoded = guess[..., VARIABLES:].argmax(-1).gather(1, costs.argmin(1))
    return ((decoded == target[..., VARIABLES:].argmax(-1)) & mask).sum(1)


def loss(model, batch, args, facts):
    """recon + beta min(1, step / beta_steps) kl, means over the stays of the batch."""
    stays = per_stay(model(batch["inputs"]), batch["inputs"], args)
    recon, kl = stays["recon"].mean(), stays["kl"].mean()
    warmed_up = min(1.0, batch["step"] / args.beta_steps) if args.beta_steps else 1.0
    decoded = int(stays["decoded"].sum()) / int(stays["events"].sum())
    return recon + args.beta * warmed_up * kl, {"recon": recon.detach(), "kl": kl.detach(),
                                                "decoded": decoded}


def outputs(model, batch, args, facts):
    return per_stay(model(batch["inputs"]), batch["inputs"], args)


def scores(outputs, split, args, facts):
    """The loss at the full beta, without noise; `decoded`: decoded variables / events."""
    recon, kl = (float(outputs[name].double().mean()) for name in ("recon", "kl"))
    decoded = int(outputs["decoded"].sum()) / int(outputs["events"].sum())
    return {"loss": recon + args.beta * kl, "recon": recon, "kl": kl, "decoded": decoded}


def floors(split, args, facts):
    """Constants: the same guess for all sets, the mean event or one of each frequent variable.

    Their code has mu = logvar = 0, so its KL divergence is the free bits.
    """
    encoder = seqsetvae.encoder(args)
    share = torch.tensor(facts["frequency"], device=args.device)
    unit = torch.eye(VARIABLES, device=args.device)
    frequent = unit[share.argsort(descending=True, stable=True)]
    frequent = frequent.repeat(math.ceil(facts["largest_set"] / VARIABLES), 1)
    rows = {}
    for name, directions in (("constant mean", share.expand(len(frequent), -1)),
                             ("constant frequent", frequent)):
        # scaled values have mean 0
        guesses = torch.cat([torch.zeros_like(directions), directions], 1)

        def constant(batch):
            output = constant_output(guesses, encoder, args, batch["inputs"])
            return per_stay(output, batch["inputs"], args)

        rows[name] = scores(outputs_over(split, constant), split, args, facts)
    free = args.free_bits * args.width
    rows["ceiling"] = {"loss": args.beta * free, "recon": 0.0, "kl": free, "decoded": 1.0}
    return rows


def constant_output(guesses, encoder, args, inputs):
    """The output of SeqSetVAE, with the same guesses (seeds, 2 variables) for every set."""
    events = encoder.events(inputs)
    code = inputs["values"].new_zeros(len(inputs["sizes"]), args.width)
    chunks = []
    for sets, index, mask in models.sets_by_size(inputs["sizes"]):
        guess = guesses[: mask.shape[1]].expand(len(sets), -1, -1)
        chunks.append({"sets": sets, "guess": guess, "target": events[index], "mask": mask})
    return {"mu": code, "logvar": code, "sets": chunks}


def examples(outputs, split, args, facts):
    """The worst stay has the largest reconstruction error."""
    return outputs["recon"].numpy(), {}


TASK = dataclasses.replace(
    seqsetvae.TASK, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
    predictions=functools.partial(no_predictions, "death"), examples=examples)
