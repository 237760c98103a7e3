"""Trains with the installed package, from a directory that is not the repository."""

from pathlib import Path

import torch

import cm_fused


def main() -> None:
    """Check that the installed wheel brings the C++ backend and that it trains."""
    repository = Path(__file__).resolve().parents[2]
    assert not Path(cm_fused.__file__).is_relative_to(repository / "cm_fused"), cm_fused.__file__
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = cm_fused.AdamCM(model.parameters(), lr=1e-2, backend="cpu")
    inputs = torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses
    print(f"installed wheel: loss {losses[0]:.3f} to {losses[-1]:.4f} on {cm_fused.__file__}")


if __name__ == "__main__":
    main()
