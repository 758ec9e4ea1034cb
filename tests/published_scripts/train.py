"""The calls of the published train.py, in order, on one process and latents made up here."""

import argparse
from collections import OrderedDict
from copy import deepcopy

import torch
import torch.distributed as dist
from diffusion import create_diffusion
from models import DiT_models
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    ema_params = OrderedDict(ema_model.named_parameters())
    model_params = OrderedDict(model.named_parameters())
    for name, param in model_params.items():
        ema_params[name].mul_(decay).add_(param.data, alpha=1 - decay)


def requires_grad(model, flag=True):
    for p in model.parameters():
        p.requires_grad = flag


def main(args):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(args.global_seed * dist.get_world_size() + dist.get_rank())

    latent_size = args.image_size // 8
    model = DiT_models[args.model](input_size=latent_size, num_classes=args.num_classes)
    ema = deepcopy(model)
    requires_grad(ema, False)
    model = DDP(model)
    diffusion = create_diffusion(timestep_respacing="")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    update_ema(ema, model.module, decay=0)
    model.train()
    ema.eval()
    losses = []
    for _ in range(args.steps):
        x = torch.randn(2, 4, latent_size, latent_size).mul_(0.18215)
        y = torch.randint(0, args.num_classes, (2,))
        t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],))
        model_kwargs = dict(y=y)  # noqa: C408
        loss_dict = diffusion.training_losses(model, x, t, model_kwargs)
        loss = loss_dict["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model.module)
        losses.append(loss.item())
    checkpoint = {
        "model": model.module.state_dict(),
        "ema": ema.state_dict(),
        "opt": opt.state_dict(),
        "args": args,
    }
    torch.save(checkpoint, args.out)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=str, choices=list(DiT_models.keys()), default="DiT-XL/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--global-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=str, required=True)
    losses = main(parser.parse_args())
