"""The engines, for tests that choose one without its proof."""

from critical_weight_analysis.layerwise.decoder_structure import Structure
from critical_weight_analysis.layerwise.engine import LayerwiseEngine
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.probe import probe
from critical_weight_analysis.whole_model import WholeModelEngine


def structure_of(model, checkpoint=None):
    structure = probe(model, checkpoint)
    assert isinstance(structure, Structure), structure
    return structure


class _Layerwise:
    """The layer-by-layer engine of whichever model it is called with."""

    name, account, together, gives = "layerwise", "layer by layer", True, LayerwiseEngine.gives

    def sensitivities(self, model, sequences, names, needs, settings=Settings()):
        engine = LayerwiseEngine(structure_of(model, settings.checkpoint))
        return engine.sensitivities(model, sequences, names, needs, settings)


LAYERWISE, WHOLE_MODEL = _Layerwise(), WholeModelEngine()
