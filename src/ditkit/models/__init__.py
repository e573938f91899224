"""Backbones, one file each."""

from ditkit.models.convlstm import ConvLSTM, ConvLSTMConfig
from ditkit.models.ddt import DiTDH, DiTDHConfig
from ditkit.models.dico import DiCo, DiCoConfig
from ditkit.models.dimr import DiMR, DiMRConfig
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.lamamba import LaMamba, LaMambaConfig
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.models.pt_dit import PTDiT, PTDiTConfig, VideoPTDiT, VideoPTDiTConfig
from ditkit.models.todyformer import Todyformer, TodyformerConfig
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig

__all__ = [
    "VDT",
    "ConvLSTM",
    "ConvLSTMConfig",
    "DiCo",
    "DiCoConfig",
    "DiMR",
    "DiMRConfig",
    "DiT",
    "DiTConfig",
    "DiTDH",
    "DiTDHConfig",
    "LaMamba",
    "LaMambaConfig",
    "PTDiT",
    "PTDiTConfig",
    "PredFormer",
    "PredFormerConfig",
    "Todyformer",
    "TodyformerConfig",
    "VDTConfig",
    "VideoDiT",
    "VideoDiTConfig",
    "VideoPTDiT",
    "VideoPTDiTConfig",
]
