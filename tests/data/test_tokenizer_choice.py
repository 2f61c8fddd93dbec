"""Every row of the table in `decide`."""

from __future__ import annotations

import pytest

from jaxllm.data.tokenizer_choice import Choice, Kept, Refuse, decide

TRAINED = {"source": "files/1", "documents": 32, "fields": ["text"], "vocab_size": 448}
LARGER = {**TRAINED, "vocab_size": 512}
GIVEN, OTHER = {"fingerprint": "aa"}, {"fingerprint": "bb"}
KEEP, MAKE, AGAIN, REFUSE = Choice.KEEP, Choice.MAKE, Choice.MAKE_AGAIN, Refuse


@pytest.mark.parametrize(
    ("kept", "wanted", "new", "begun"),
    [
        (None, TRAINED, MAKE, AGAIN),
        (None, GIVEN, MAKE, AGAIN),
        (None, None, MAKE, REFUSE),
        (Kept(None, by_run=True), None, MAKE, KEEP),  # its file is missing: the run has moved
        (Kept(TRAINED, by_run=True), TRAINED, KEEP, KEEP),
        (Kept(GIVEN, by_run=False), GIVEN, KEEP, KEEP),
        (Kept(None, by_run=False), TRAINED, KEEP, KEEP),  # put there by a person, for a config with tokenizer: train
        (Kept(GIVEN, by_run=False), OTHER, REFUSE, REFUSE),
        (Kept(TRAINED, by_run=True), LARGER, MAKE, REFUSE),
        (Kept(GIVEN, by_run=True), OTHER, MAKE, REFUSE),
        (Kept(GIVEN, by_run=True), TRAINED, MAKE, REFUSE),
    ],
)
def test_a_tokenizer_is_kept_made_or_the_config_refused(
    kept: Kept | None, wanted: dict | None, new: object, begun: object
) -> None:
    for expected, state in ((new, False), (begun, True)):
        found = decide(kept, wanted, begun=state)
        assert isinstance(found, Refuse) if expected is REFUSE else found is expected


def test_a_refusal_names_what_differs() -> None:
    found = decide(Kept(TRAINED, by_run=True), LARGER, begun=True)
    assert isinstance(found, Refuse) and "(vocab_size 448 -> 512; files of a corpus" in found.reason
