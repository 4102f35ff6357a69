"""``nn.TransformerEncoder`` in eval mode leaves padding out where torch does, however the encoder is cut."""
import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_step, forward_loss, gradients, reference_step
from torch import nn

import pipeengine as pe

pytestmark = [pytest.mark.usefixtures("quiet_and_seeded"), pytest.mark.filterwarnings("ignore")]
LENGTHS = torch.tensor([7, 3, 5, 2, 7, 4])
RIGHT = torch.arange(7)[None] >= LENGTHS[:, None]
MASKS = {"at the end": RIGHT, "at the beginning": RIGHT.flip(1), "none": torch.zeros_like(RIGHT),
         "as floats": torch.zeros(6, 7).masked_fill(RIGHT, -torch.inf),
         "of a whole row": RIGHT | (torch.arange(6) == 3)[:, None]}


class Tagger(nn.Module):
    def __init__(self, norm: bool = True, mask_check: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(16) if norm else None, mask_check=mask_check)
        self.head = nn.Linear(16, 50)

    def forward(self, ids, padding):
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding))


def tagged(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def made(model, padding):
    ids = torch.randint(0, 50, (6, 7))
    pipe = pe.Pipeline(model, dict(ids=ids, padding=padding), num_stages=3, num_microbatches=2, loss_fn=tagged,
                       target=ids, costs="analytic")
    assert len(set(pipe.plan.stage_of.values())) == 3
    return pipe, dict(ids=torch.randint(0, 50, (6, 7)), padding=padding)


@pytest.mark.parametrize("norm", (True, False))
@pytest.mark.parametrize("padding", MASKS.values(), ids=MASKS)
def test_evaluate(padding, norm):
    """Torch fills with zeros what is padded at the end, and only that; the loss reads those positions too."""
    model = Tagger(norm)
    plain = copy.deepcopy(model).eval()
    pipe, given = made(model, RIGHT)
    given["padding"] = padding
    pipe.eval()
    found = pipe.evaluate(**given, target=given["ids"])
    with torch.no_grad():
        torch.testing.assert_close(found, plain(**given), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(pipe.loss, forward_loss(plain, given, tagged, given["ids"]))


@pytest.mark.parametrize("frozen", (True, False))
def test_train_behind_an_encoder_in_eval_mode(frozen):
    model = Tagger()
    model.eval()
    model.embedding.requires_grad_(not frozen), model.encoder.requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    pipe, given = made(model, RIGHT)
    expected = reference_step(plain, given, 2, loss_fn=tagged, target=given["ids"])
    assert_same_step(expected, (pipe.step(**given, target=given["ids"]), gradients(model)), 1e-5)


def test_without_a_look_at_the_mask():
    """``mask_check=False`` packs whatever the mask, which nobody may look at."""
    model = Tagger(mask_check=False)
    plain = copy.deepcopy(model).eval()
    pipe, given = made(model, RIGHT)
    pipe.eval()
    with torch.no_grad():
        torch.testing.assert_close(pipe.evaluate(**given), plain(**given), rtol=1e-5, atol=2e-6)
