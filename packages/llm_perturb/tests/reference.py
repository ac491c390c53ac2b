"""The plain truth that the package is compared with: loops, one sequence at a time, no code of its subject."""

import copy

import torch
from torch import Tensor, nn


def naive_loss(model: nn.Module, sequence: Tensor) -> Tensor:
    """S of one sequence alone, in float64: minus the log probability of each token but the first, added up."""
    logits = model(input_ids=sequence[None]).logits[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for position in range(1, len(sequence)):
        probabilities = torch.log_softmax(logits[position - 1], dim=0)
        total = total - probabilities[sequence[position]]
    return total


def naive_losses(model: nn.Module, sequences: list[Tensor]) -> Tensor:
    """S_i of every sequence, each alone."""
    with torch.no_grad():
        return torch.stack([naive_loss(model, sequence) for sequence in sequences])


def naive_gradients(model: nn.Module, sequences: list[Tensor], name: str) -> list[Tensor]:
    """dS_i/dθ of every sequence, on a copy of the model; a tied tensor has the gradients of all its uses."""
    twin = copy.deepcopy(model).requires_grad_(False)
    parameter = twin.get_parameter(name).requires_grad_(True)
    return [torch.autograd.grad(naive_loss(twin, sequence), parameter)[0] for sequence in sequences]


def naive_score(model: nn.Module, sequences: list[Tensor], name: str, metric: str) -> Tensor:
    """The score of every weight of a parameter, as a tensor of its shape, by the definition of the metric."""
    weight = model.get_parameter(name).detach().double()
    gradients = naive_gradients(model, sequences, name)
    n_predicted = [len(sequence) - 1 for sequence in sequences]
    n, n_tokens = len(sequences), sum(n_predicted)
    score = torch.empty_like(weight).view(-1)
    for j, theta in enumerate(weight.reshape(-1).tolist()):
        s = [gradient.reshape(-1)[j].item() for gradient in gradients]
        slope = sum(s) / n_tokens
        curvature = sum(value**2 for value in s) / n_tokens
        score[j] = {
            "grad_x_weight": abs(theta * slope),
            "grad_squared": sum((value / t) ** 2 for value, t in zip(s, n_predicted, strict=True)) / n,
            "obd": 0.5 * theta**2 * curvature,
            "taylor2": abs(-theta * slope + 0.5 * theta**2 * curvature),
            "magnitude": abs(theta),
        }[metric]
    return score.view_as(weight)


def naive_highest(scores: list[float], k: int) -> list[int]:
    """Positions of the k highest, by sorting all of them; of equal ones, the first."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]


def naive_lowest(scores: list[float], k: int) -> list[int]:
    """Positions of the k lowest, by sorting all of them; of equal ones, the first."""
    return sorted(range(len(scores)), key=lambda j: (scores[j], j))[:k]


def rewritten(model: nn.Module, changes: dict[str, dict[int, float]]) -> nn.Module:
    """A copy of the model, loaded from a state dict in which the weights at flat indices have other values."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, entries in changes.items():
        storage = model.state_dict()[name].data_ptr()
        for other, tensor in model.state_dict().items():
            if tensor.data_ptr() == storage:  # the other names of a tied tensor
                for index, value in entries.items():
                    row_major = state[other].reshape(-1).tolist()
                    row_major[index] = value
                    state[other] = torch.tensor(row_major, dtype=tensor.dtype).reshape(tensor.shape)
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    return twin


def zeroed(model: nn.Module, chosen: dict[str, list[int]]) -> nn.Module:
    """A copy of the model with these weights at zero."""
    return rewritten(model, {name: dict.fromkeys(indices, 0.0) for name, indices in chosen.items()})


def every_bit(model: nn.Module) -> dict[str, bytes]:
    """The memory of every tensor of the model, by name."""
    return {name: tensor.detach().cpu().contiguous().numpy().tobytes() for name, tensor in model.state_dict().items()}
