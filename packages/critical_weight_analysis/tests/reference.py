"""Brute force: the same quantities, computed the slow and obvious way, sharing no code with the package."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class Naive:
    """What ``naive_sensitivities`` finds: the summed losses, and by parameter name the weights and gradient sums."""

    losses: torch.Tensor
    n_tokens: int
    weight: dict[str, torch.Tensor]
    grad: dict[str, torch.Tensor]
    fisher: dict[str, torch.Tensor]
    curvature: dict[str, torch.Tensor]
    of: tuple  # (model, sequences)

    @cached_property
    def tokens(self):
        """Of matrices."""
        return naive_positions(*self.of)[0]

    @cached_property
    def inputs(self):
        """Of matrices."""
        return naive_positions(*self.of)[1]


def naive_loss(model, sequence):
    """The summed loss of one sequence, from the logits and a log-softmax written out."""
    logits = model(input_ids=sequence[None]).logits[0]
    log_probabilities = logits - logits.logsumexp(dim=-1, keepdim=True)
    return -sum(log_probabilities[t, sequence[t + 1]] for t in range(len(sequence) - 1))


def naive_gradients(model, sequence):
    """The loss of one sequence and its gradient for every parameter, tied ones once, under their first name."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = naive_loss(model, sequence)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def naive_sensitivities(model, sequences) -> Naive:
    """Every field that the metrics use, from one gradient per sequence, all of them kept."""
    found = [naive_gradients(model, sequence) for sequence in sequences]
    lengths = [len(sequence) - 1 for sequence in sequences]
    n_tokens = sum(lengths)
    weight = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grad, fisher, curvature = {}, {}, {}
    for name in weight:
        gradients = [by_name[name] for _, by_name in found]
        grad[name] = sum(gradients) / n_tokens
        fisher[name] = sum((g / length) ** 2 for g, length in zip(gradients, lengths, strict=True)) / len(sequences)
        curvature[name] = sum(g**2 for g in gradients) / n_tokens
    losses = torch.tensor([loss.item() for loss, _ in found], dtype=torch.float64)
    return Naive(losses, n_tokens, weight, grad, fisher, curvature, (model, sequences))


def naive_positions(model, sequences):
    """(Σ_i Σ_t G_it² / N, Σ_i Σ_t x_it²) of every matrix: each position is given a copy of the weights of its own."""
    tokens, inputs = {}, {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for sequence in sequences:
        n = len(sequence)  # the last position predicts nothing, but is one of the inputs
        own = {
            id(p): p.detach().expand(n, *p.shape).clone().requires_grad_() for p in model.parameters() if p.ndim == 2
        }
        seen = {key: torch.zeros_like(copies[0]) for key, copies in own.items()}

        def with_copies(module, args, output, own=own, seen=seen, n=n):
            key, x = id(module.weight), args[0].reshape(n, -1)
            if isinstance(module, torch.nn.Embedding):
                ids = x[:, 0]
                for token in ids.tolist():
                    seen[key][token] += 1
                return torch.stack([copy[token] for copy, token in zip(own[key], ids, strict=True)])[None] * getattr(
                    module, "scalar_embed_scale", 1
                )
            bias = 0 if module.bias is None else module.bias
            if isinstance(module, torch.nn.Linear):
                seen[key] += (x.detach() ** 2).sum(0)
                return (torch.einsum("toi,ti->to", own[key], x) + bias)[None]
            seen[key] += (x.detach() ** 2).sum(0)[:, None]
            return (torch.einsum("tio,ti->to", own[key], x) + bias)[None]

        modules = [m for m in model.modules() if hasattr(m, "weight") and m.weight is not None and m.weight.ndim == 2]
        handles = [module.register_forward_hook(with_copies) for module in modules]
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        loss = -logits.log_softmax(1)[range(n - 1), sequence[1:]].sum()
        loss.backward()
        for handle in handles:
            handle.remove()
        for key, copies in own.items():
            tokens[names[key]] = tokens.get(names[key], 0) + (copies.grad**2).sum(0)
            inputs[names[key]] = inputs.get(names[key], 0) + seen[key]
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    return {name: total / n_tokens for name, total in tokens.items()}, inputs


def naive_hessian_diagonal(model, sequences, name, indices, step=1e-3):
    """d²L/dθ² of some weights by second central differences of the mean loss per token."""
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    found = []
    for index in indices:
        losses = []
        for sign in (1, 0, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                dict(moved.named_parameters())[name][index] += sign * step
                losses.append(sum(naive_loss(moved, sequence).item() for sequence in sequences) / n_tokens)
        found.append((losses[0] - 2 * losses[1] + losses[2]) / step**2)
    return torch.tensor(found, dtype=torch.float64)


def naive_hessian_product(model, sequences, vectors, step=1e-6):
    """H v by name: the gradient of the mean loss per token at θ + εv less that at θ - εv, over 2ε."""
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    found = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, vector in vectors.items():
                dict(moved.named_parameters())[name] += sign * step * vector
        for sequence in sequences:
            _, gradients = naive_gradients(moved, sequence)
            for name in found:
                found[name] += sign * gradients[name] / (2 * step * n_tokens)
    return found


def naive_score(metric, naive: Naive, name):
    """The score of every weight of a parameter, from the definition."""
    theta, g, h = naive.weight[name], naive.grad[name], naive.curvature[name]
    if metric in ("grad_squared_token", "wanda"):
        return naive.tokens[name] if metric == "grad_squared_token" else abs(theta) * naive.inputs[name] ** 0.5
    return {
        "grad_x_weight": abs(theta * g),
        "grad_squared": naive.fisher[name],
        "grad_squared_batch": g * g,
        "obd": theta * theta * h / 2,
        "taylor2": abs(theta * theta * h / 2 - theta * g),
        "magnitude": abs(theta),
    }[metric]


def finite_difference(model, sequences, name, index, step=1e-5):
    """dL/dθ of one weight by central differences of the mean loss per token."""
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            dict(moved.named_parameters())[name][index] += sign * step
            losses.append(sum(naive_loss(moved, sequence).item() for sequence in sequences) / n_tokens)
    return (losses[0] - losses[1]) / (2 * step)


def naive_top(scores, k):
    """(parameter name, row, col, score) of the K highest, by sorting everything.

    ``scores`` maps names to tensors, in parameter order; ties go by (parameter order, row, col). The col of a
    one-dimensional tensor is None.
    """
    everything = []
    for order, (name, tensor) in enumerate(scores.items()):
        for row, entry in enumerate(tensor.tolist()):
            columns = enumerate(entry) if isinstance(entry, list) else [(None, entry)]
            everything += [(-score, order, row, col or 0, name, col) for col, score in columns]
    everything.sort(key=lambda line: line[:4])
    return [(name, row, col, -minus) for minus, _, row, _, name, col in everything[:k]]


def naive_p99(tensor):
    """The smallest value that at least 99 % of the values do not exceed."""
    values = sorted(tensor.flatten().tolist())
    return next(v for v in values if 100 * sum(other <= v for other in values) >= 99 * len(values))
