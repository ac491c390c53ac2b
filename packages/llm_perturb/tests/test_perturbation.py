import struct

import numpy as np
import pytest
import torch
from bridge.exchange.errors import RequestError, RunError
from llm_perturb.evaluation.parameters import named_parameters
from llm_perturb.perturbation import Perturbation, bits, flip_bit, perturbed, round_to_grid
from reference import every_bit
from tiny_models import build
from torch.nn import Parameter

KINDS = ["zero", "sign_flip", "scale", "gaussian_noise", "bit_flip", "quantize"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def changed(kind, tensor, index, seed=0, **numbers):
    rng = np.random.default_rng(seed)
    return Perturbation(kind, **numbers).new_values(tensor, torch.tensor(index), (0,), rng)


def matrix(dtype=torch.float32, shape=(5, 4), seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# the formulas


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_formula_keeps_the_dtype_and_takes_the_weights_asked_for(dtype):
    for kind in KINDS:
        found = changed(kind, matrix(dtype), [7, 0, 19])
        assert found.dtype == dtype
        assert found.shape == (3,)


def test_zero_sign_flip_and_scale_are_what_they_say():
    tensor, index = matrix(), [7, 0, 19]
    theta = [tensor[1, 3].item(), tensor[0, 0].item(), tensor[4, 3].item()]
    assert changed("zero", tensor, index).tolist() == [0.0, 0.0, 0.0]
    assert changed("sign_flip", tensor, index).tolist() == [-value for value in theta]
    assert changed("scale", tensor, index, factor=0.25).tolist() == [0.25 * value for value in theta]
    assert changed("scale", tensor, index, factor=-2.0).tolist() == [-2.0 * value for value in theta]


def test_the_formulas_change_nothing_themselves():
    tensor = matrix()
    before = tensor.clone()
    for kind in KINDS:
        changed(kind, tensor, [7, 0, 19])
    assert torch.equal(tensor, before)


def test_noise_is_standard_normal_times_the_spread_of_the_whole_tensor():
    tensor = 3 * matrix(torch.float64, (200, 200)) + 1
    spread = np.sqrt(np.mean((tensor.numpy() - tensor.numpy().mean()) ** 2))
    index = list(range(0, 40_000, 4))
    noise = (changed("gaussian_noise", tensor, index, sigma=0.5) - tensor.view(-1)[index]).numpy() / (0.5 * spread)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.03
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.02


def test_noise_is_that_of_the_generator_weight_by_weight():
    tensor = matrix(torch.float64, (2, 3))
    expected = tensor.view(-1).numpy()[[4, 1]] + 2.5 * tensor.numpy().std() * np.random.default_rng(7).normal(size=2)
    found = changed("gaussian_noise", tensor, [4, 1], seed=7, sigma=2.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_noise_follows_its_generator():
    tensor, index = matrix(), [1, 2, 3]
    first = changed("gaussian_noise", tensor, index)
    assert torch.equal(changed("gaussian_noise", tensor, index), first)
    assert not torch.equal(changed("gaussian_noise", tensor, index, seed=1), first)
    assert torch.equal(changed("gaussian_noise", tensor, index, sigma=0.0), tensor.view(-1)[index])


VALUES = [0.0, -0.0, 1.0, -1.5, 0.0078125, 3.0, 6.1e-5, -100.0]


@pytest.mark.parametrize("bit", [0, 1, 22, 23, 30, 31])
def test_a_bit_of_float32_is_flipped_as_in_memory(bit):
    found = flip_bit(torch.tensor(VALUES), bit)
    expected = [struct.pack("<I", struct.unpack("<I", struct.pack("<f", value))[0] ^ (1 << bit)) for value in VALUES]
    assert found.numpy().tobytes() == b"".join(expected)


@pytest.mark.parametrize("bit", [0, 9, 10, 14, 15])
def test_a_bit_of_float16_is_flipped_as_in_memory(bit):
    values = np.array(VALUES, dtype=np.float16)
    found = flip_bit(torch.from_numpy(values.copy()), bit)
    assert found.numpy().tobytes() == (values.view(np.uint16) ^ np.uint16(1 << bit)).tobytes()


@pytest.mark.parametrize("bit", [0, 6, 7, 14, 15])
def test_a_bit_of_bfloat16_is_bit_16_higher_of_float32(bit):
    found = flip_bit(torch.tensor(VALUES, dtype=torch.bfloat16), bit).float().numpy()
    wide = torch.tensor(VALUES, dtype=torch.bfloat16).float().numpy()
    assert found.tobytes() == (wide.view(np.uint32) ^ np.uint32(1 << (bit + 16))).tobytes()


@pytest.mark.parametrize("bit", [0, 51, 52, 62, 63])
def test_a_bit_of_float64_is_flipped_as_in_memory(bit):
    values = np.array(VALUES)
    found = flip_bit(torch.from_numpy(values.copy()), bit)
    assert found.numpy().tobytes() == (values.view(np.uint64) ^ np.uint64(1 << bit)).tobytes()


@pytest.mark.parametrize(
    ("dtype", "bit"), [(torch.float64, 62), (torch.float32, 30), (torch.bfloat16, 14), (torch.float16, 14)]
)
def test_the_default_bit_is_the_highest_of_the_exponent(dtype, bit):
    values = torch.tensor([0.01, -0.5, 1.5, -4.0], dtype=dtype)
    found = flip_bit(values, None)
    assert torch.equal(bits(found), bits(flip_bit(values, bit)))
    assert (found[:2].abs() > 1000 * values[:2].abs()).all()
    assert not found[2].isfinite()  # from 1 to 2, only this bit of the exponent is clear
    assert -0.01 < found[3] < 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bit_flipped_twice_is_the_same_bits(dtype):
    values = matrix(dtype)
    for bit in range(torch.finfo(dtype).bits):
        assert torch.equal(bits(flip_bit(flip_bit(values, bit), bit)), bits(values))
        assert (bits(flip_bit(values, bit)) != bits(values)).all()


def naive_quantized(weight, channels, n_bits):
    """Loops over output channels: the largest |θ| of a channel is the last of 2^(n-1) - 1 steps on either side."""
    quantized = weight.copy()
    for channel in channels:
        step = np.abs(weight[channel]).max() / (2 ** (n_bits - 1) - 1)
        values = weight[channel].reshape(-1)
        rounded = np.array([np.round(value / step) * step if step > 0 else value for value in values])
        quantized[channel] = rounded.reshape(weight[channel].shape)
    return quantized


ROWS = [np.s_[row] for row in range(5)]
COLUMNS = [np.s_[:, column] for column in range(4)]
EXPERT_ROWS = [np.s_[expert, row] for expert in range(3) for row in range(5)]
EXPERT_COLUMNS = [np.s_[expert, :, column] for expert in range(3) for column in range(4)]


@pytest.mark.parametrize("n_bits", [2, 3, 8])
@pytest.mark.parametrize(
    ("shape", "axes", "channels"),
    [
        pytest.param((5, 4), (0,), ROWS, id="Linear (O, I)"),
        pytest.param((5, 4), (1,), COLUMNS, id="Conv1D (I, O)"),
        pytest.param((5, 4, 3), (0,), ROWS, id="convolution (O, I, width)"),
        pytest.param((3, 5, 4), (0, 1), EXPERT_ROWS, id="experts (E, O, I)"),
        pytest.param((3, 5, 4), (0, 2), EXPERT_COLUMNS, id="experts (E, I, O)"),
        pytest.param((7,), (), [np.s_[:]], id="vector"),
    ],
)
def test_quantize_rounds_each_output_channel_on_its_own_grid(shape, axes, channels, n_bits):
    weight = matrix(torch.float64, shape)
    weight[tuple(0 for _ in shape)] = 10  # one channel with larger steps
    quantized = round_to_grid(weight, torch.arange(weight.numel()), axes, n_bits).view_as(weight).numpy()
    np.testing.assert_allclose(quantized, naive_quantized(weight.numpy(), channels, n_bits), rtol=1e-12)
    assert all(len(np.unique(quantized[channel])) <= 2**n_bits - 1 for channel in channels)


@pytest.mark.parametrize("axes", [(0,), (1,)])
def test_quantize_of_some_weights_is_that_of_all_of_them_there(axes):
    tensor, index = matrix(shape=(6, 9)), torch.tensor([50, 3, 17, 8])
    every = round_to_grid(tensor, torch.arange(54), axes, 4)
    assert torch.equal(round_to_grid(tensor, index, axes, 4), every[index])


def test_quantize_keeps_the_largest_of_a_channel_and_all_of_a_zero_channel():
    tensor = torch.tensor([[0.3, -2.0, 0.1], [0.0, 0.0, 0.0]])
    found = round_to_grid(tensor, torch.arange(6), (0,), 4)
    assert found[1] == -2.0
    assert found[3:].tolist() == [0.0, 0.0, 0.0]


def test_quantize_of_a_vector_has_one_grid():
    found = round_to_grid(torch.tensor([7.0, 3.4, -3.6, 0.2]), torch.arange(4), (), 4)
    assert found.tolist() == [7.0, 3.0, -4.0, 0.0]
    assert round_to_grid(torch.tensor(-0.3), torch.tensor([0]), (), 4) == -torch.tensor(0.3)


def test_quantize_of_a_channel_with_nan_keeps_it():
    found = round_to_grid(torch.tensor([[0.3, -2.0, torch.nan], [0.5, 0.7, 0.1]]), torch.arange(5), (0,), 4)
    assert found[:2].tolist() == torch.tensor([0.3, -2.0]).tolist()
    assert found[2].isnan()
    assert found[3:].tolist() == pytest.approx([0.5, 0.7])


def test_each_kind_is_its_own_formula_with_its_own_numbers():
    tensor, index = matrix(), [7, 0, 19]
    numbers = {"factor": 3.0, "sigma": 2.0, "bit": 5, "n_bits": 3}
    assert torch.equal(changed("bit_flip", tensor, index, **numbers), flip_bit(tensor.view(-1)[index], 5))
    for axes in ((0,), (1,)):
        rounded = Perturbation("quantize", **numbers).new_values(tensor, torch.tensor(index), axes, None)
        assert torch.equal(rounded, round_to_grid(tensor, torch.tensor(index), axes, 3))
    assert torch.equal(changed("scale", tensor, index, **numbers), 3 * tensor.view(-1)[index])


def test_the_numbers_of_a_kind_unless_others_are_named():
    assert [Perturbation(kind).label for kind in KINDS] == [
        "zero", "sign_flip", "scale(0.5)", "gaussian_noise(1.0)", "bit_flip(exponent)", "quantize(4)"
    ]  # fmt: skip


def test_labels_tell_kinds_and_numbers_apart():
    assert Perturbation("zero").label == "zero"
    assert Perturbation("scale", factor=0.25).label == "scale(0.25)"
    assert Perturbation("gaussian_noise", sigma=2.0).label == "gaussian_noise(2.0)"
    assert Perturbation("bit_flip").label == "bit_flip(exponent)"
    assert Perturbation("bit_flip", bit=0).label == "bit_flip(0)"
    assert Perturbation("quantize", n_bits=3).label == "quantize(3)"


# the one place that writes to a model


def special(dtype):
    """Ordinary weights among NaNs of several payloads, both zeros, infinities and subnormals."""
    info, width = torch.finfo(dtype), torch.finfo(dtype).bits
    tensor = matrix(dtype, (4, 4))
    integers = tensor.view(INTEGERS[dtype])
    all_ones = -1
    integers.view(-1)[0] = all_ones  # a NaN, negative, whole payload
    integers.view(-1)[1] = (1 << (width - 1)) - 1  # a NaN, positive
    integers.view(-1)[2] = -(1 << (width - 1))  # -0.0
    integers.view(-1)[3] = 1  # the smallest subnormal
    tensor.view(-1)[4] = torch.inf
    tensor.view(-1)[5] = -info.max
    tensor.view(-1)[6] = 0.0
    quiet_bit = {torch.float64: 51, torch.float32: 22, torch.bfloat16: 6, torch.float16: 9}[dtype]
    integers.view(-1)[7] = integers.view(-1)[4] | (1 << (quiet_bit - 1)) | 1  # a signalling NaN
    return tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(dtype, kind):
    if kind in {"quantize", "gaussian_noise"}:
        tensor = matrix(dtype, (4, 4))
        tensor[0, 0] = -0.0
    else:
        tensor = special(dtype)
    parameter = Parameter(tensor.clone(), requires_grad=False)
    before = bits(parameter.detach()).clone()

    def change(name, stored, index):
        return Perturbation(kind).new_values(stored, index, (0,), np.random.default_rng(0))

    with perturbed({"p": parameter}, {"p": torch.arange(16)}, change) as n_changed:
        other_bits = bits(parameter.detach()) != before
        both_zero = (parameter == 0) & (before.view(dtype) == 0)
        assert int((other_bits & ~both_zero).sum()) == n_changed > 0
    assert torch.equal(bits(parameter.detach()), before)


def two_parameters():
    return {"a": Parameter(matrix(), requires_grad=False), "b": Parameter(matrix(seed=2), requires_grad=False)}


def zero(name, tensor, index):
    return torch.zeros_like(tensor.view(-1)[index])


def test_only_the_chosen_weights_change():
    parameters = two_parameters()
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    with perturbed(parameters, {"b": torch.tensor([3, 17])}, zero) as n_changed:
        assert n_changed == 2
        assert torch.equal(parameters["a"], before["a"])
        assert (parameters["b"] != before["b"]).view(-1).nonzero()[:, 0].tolist() == [3, 17]
        assert parameters["b"].view(-1)[[3, 17]].tolist() == [0.0, 0.0]


def test_only_weights_whose_value_changes_are_counted():
    parameters = two_parameters()
    parameters["a"].data.view(-1)[0] = 0.0
    parameters["a"].data.view(-1)[1] = -0.0
    with perturbed(parameters, {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([5])}, zero) as n_changed:
        assert n_changed == 2  # -0.0 becomes 0.0: the same number


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_weights_come_back_after_any_exception_in_the_block(exception):
    parameters = two_parameters()
    before = {name: bits(parameter.detach()).clone() for name, parameter in parameters.items()}
    chosen = {"a": torch.arange(20), "b": torch.tensor([4])}
    with pytest.raises(exception, match="in the block"), perturbed(parameters, chosen, zero):
        assert parameters["a"].abs().sum() == 0
        raise exception("in the block")
    assert all(torch.equal(bits(parameters[name].detach()), before[name]) for name in parameters)


def test_the_first_tensor_comes_back_when_the_second_change_raises():
    parameters = two_parameters()
    before = {name: parameter.clone() for name, parameter in parameters.items()}

    def change(name, tensor, index):
        if name == "b":
            raise ZeroDivisionError("second")
        return zero(name, tensor, index)

    with pytest.raises(ZeroDivisionError, match="second"):
        with perturbed(parameters, {"a": torch.tensor([1]), "b": torch.tensor([1])}, change):
            pytest.fail("the block must not run")
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


def test_the_first_tensor_comes_back_when_the_second_cannot_be_written():
    parameters = two_parameters()
    before = {name: parameter.clone() for name, parameter in parameters.items()}

    def change(name, tensor, index):
        return torch.zeros(3) if name == "b" else zero(name, tensor, index)  # three values for one weight

    with pytest.raises((RuntimeError, IndexError), match="shape|mismatch"):
        with perturbed(parameters, {"a": torch.tensor([1]), "b": torch.tensor([1])}, change):
            pytest.fail("the block must not run")
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


def test_a_tensor_that_could_only_be_copied_is_never_silently_left_alone():
    parameter = Parameter(matrix().t(), requires_grad=False)  # not contiguous: reshape would copy
    before = parameter.detach().clone()
    with pytest.raises((RuntimeError, RunError), match="view|contiguous|new value"):
        with perturbed({"p": parameter}, {"p": torch.tensor([3])}, zero):
            pytest.fail("the block must not run")
    assert torch.equal(parameter, before)


def test_someone_who_writes_in_the_block_is_found_out():
    """Restoring is checked: here the storage is swapped under the parameter, so writing back misses it."""
    parameters = two_parameters()
    with pytest.raises(RunError, match="a weight of a was not restored"):
        with perturbed(parameters, {"a": torch.tensor([1])}, zero):
            parameters["a"].data = parameters["a"].detach().clone()


def test_a_tied_tensor_changes_in_all_its_uses_and_comes_back():
    model = build("gpt2")
    before = every_bit(model)
    name = "transformer.wte.weight"
    with perturbed(named_parameters(model), {name: torch.tensor([9])}, zero):
        assert model.lm_head.weight[1, 1] == 0
        assert model.transformer.wte.weight[1, 1] == 0
    assert every_bit(model) == before


@pytest.mark.parametrize(
    ("perturbation", "message"),
    [
        (Perturbation("bit_flip", bit=-1), "--bit -1: the bits of a weight in torch.float32 are numbered 0 to 31"),
        (Perturbation("bit_flip", bit=32), "--bit 32: the bits of a weight in torch.float32 are numbered 0 to 31"),
        (Perturbation("quantize", n_bits=1), "--n-bits must be 2 to 16, not 1"),
        (Perturbation("quantize", n_bits=17), "--n-bits must be 2 to 16, not 17"),
        (Perturbation("gaussian_noise", sigma=0.0), "--sigma must be above 0, not 0.0"),
    ],
)
def test_numbers_just_outside_their_range_are_refused(perturbation, message):
    with pytest.raises(RequestError, match=message):
        perturbation.check(torch.float32)


def test_numbers_at_the_ends_of_their_range_are_taken():
    for perturbation in (
        *(Perturbation("bit_flip", bit=bit) for bit in (0, 31)),
        *(Perturbation("quantize", n_bits=n_bits) for n_bits in (2, 16)),
        Perturbation("gaussian_noise", sigma=1e-9),
    ):
        perturbation.check(torch.float32)
    with pytest.raises(RequestError, match="numbered 0 to 15"):
        Perturbation("bit_flip", bit=16).check(torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_other_kinds_are_not_looked_at(kind):
    own = {"bit_flip": "bit", "quantize": "n_bits", "gaussian_noise": "sigma"}.get(kind)
    wrong = {"factor": 0.0, "sigma": -1.0, "bit": 99, "n_bits": 99}
    Perturbation(kind, **{name: number for name, number in wrong.items() if name != own}).check(torch.float32)
    if own is not None:
        with pytest.raises(RequestError, match=f"--{own.replace('_', '-')}"):
            Perturbation(kind, **{own: wrong[own]}).check(torch.float32)
