"""The calls of the published sample.py, in order, with a stand-in for the autoencoder."""

import argparse

import torch
from diffusion import create_diffusion
from download import find_model
from models import DiT_models


def main(args):
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    device = "cpu"

    latent_size = args.image_size // 8
    model = DiT_models[args.model](input_size=latent_size, num_classes=args.num_classes).to(device)
    model.load_state_dict(find_model(args.ckpt))
    model.eval()
    diffusion = create_diffusion(str(args.num_sampling_steps))

    class_labels = [2, 3]
    n = len(class_labels)
    z = torch.randn(n, 4, latent_size, latent_size, device=device)
    y = torch.tensor(class_labels, device=device)
    z = torch.cat([z, z], 0)
    y_null = torch.tensor([args.num_classes] * n, device=device)
    y = torch.cat([y, y_null], 0)
    model_kwargs = dict(y=y, cfg_scale=args.cfg_scale)  # noqa: C408

    samples = diffusion.p_sample_loop(
        model.forward_with_cfg,
        z.shape,
        z,
        clip_denoised=False,
        model_kwargs=model_kwargs,
        progress=False,
        device=device,
    )
    samples, _ = samples.chunk(2, dim=0)
    torch.save(samples / 0.18215, args.out)
    torch.set_grad_enabled(True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=str, choices=list(DiT_models.keys()), default="DiT-XL/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--num-sampling-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", type=str, default=None)
    parser.add_argument("--out", type=str, required=True)
    main(parser.parse_args())
