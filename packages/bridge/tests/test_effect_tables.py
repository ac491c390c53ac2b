import pytest
import synthetic
from bridge.report import effect_tables


@pytest.mark.parametrize("tables", [effect_tables.global_effects, effect_tables.layer_effects])
def test_each_perturbation_has_tables_of_its_own_numbers(tables):
    both, alone = synthetic.evidence_of_two_perturbations()
    zero, sign_flip = (tables(alone[perturbation]) for perturbation in ("zero", "sign_flip"))
    contents = [(table.title, table.rows) for table in tables(both)]
    assert contents == [(table.title, table.rows) for table in (zero[0], zero[1], sign_flip[1], sign_flip[0])]
    assert [table.folded for table in tables(both)] == [False, True, True, True]
    assert zero[0].rows != sign_flip[0].rows


def test_the_differences_from_random_sets_are_those_of_the_first_perturbation():
    both, alone = synthetic.evidence_of_two_perturbations()
    tables = [[table.rows for table in effect_tables.against_random(each)] for each in (both, alone["zero"])]
    assert tables[0] == tables[1] != []


def test_single_weights_have_one_table_a_perturbation():
    both, alone = synthetic.evidence_of_two_perturbations()
    rows = [table.rows for table in effect_tables.effects_of_weights(both)]
    assert rows == [effect_tables.effects_of_weights(alone[each])[0].rows for each in ("zero", "sign_flip")]
