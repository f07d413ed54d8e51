import pytest
import torch

from genvision.errors import UserError
from genvision.kernels.ternary_packing import check_packed, pack_ternary, packed_length, unpack_ternary
from parity_fixtures import Fixture

PACKINGS = ("2bit", "base3")


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_are_those_of_the_fixture(packing):
    outputs = Fixture("bitnet_ternary").outputs
    codes, packed = outputs["mean_ternary"].flatten(), outputs[f"mean_packed_{packing}"]
    assert pack_ternary(codes, packing).equal(packed)
    assert unpack_ternary(packed, len(codes), packing).equal(codes)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16, torch.float64])
def test_codes_come_back_whatever_their_number(packing, dtype):
    for length in (1, 4, 5, 19):
        codes = torch.randint(-1, 2, (2, 3, length)).to(dtype)
        packed = pack_ternary(codes, packing)
        assert packed.shape == (2, 3, packed_length(length, packing))
        unpacked = unpack_ternary(packed, length, packing, dtype)
        assert unpacked.dtype == dtype and unpacked.equal(codes)


def test_a_byte_holds_four_codes_of_two_bits_or_five_of_base_3():
    assert (packed_length(768), packed_length(768, "base3"), packed_length(5), packed_length(5, "base3")) == (192, 154, 2, 1)


def test_what_is_no_code_or_has_another_size_is_refused():
    with pytest.raises(UserError, match="must be -1, 0 or 1"):
        pack_ternary(torch.tensor([0.5, 1.0]))
    with pytest.raises(UserError, match="must be -1, 0 or 1"):
        pack_ternary(torch.tensor([0, 2]))
    with pytest.raises(UserError, match=r"with 3 bytes a row; 16 codes as 2bit take 4 bytes of torch\.uint8"):
        unpack_ternary(torch.zeros(2, 3, dtype=torch.uint8), 16)
    with pytest.raises(UserError, match=r"are torch\.int8"):
        unpack_ternary(torch.zeros(2, 4, dtype=torch.int8), 16)


@pytest.mark.parametrize(("packing", "bad"), [("2bit", 0b00110000), ("base3", 243)])
def test_bytes_that_no_code_makes_are_found(packing, bad):
    packed = pack_ternary(torch.randint(-1, 2, (4, 20)), packing)
    check_packed(packed, packing)
    packed[1, 2] = bad
    with pytest.raises(UserError, match=f"hold 1 bytes that no {packing} code makes"):
        check_packed(packed, packing)
