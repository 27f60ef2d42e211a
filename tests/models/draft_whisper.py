import sys; sys.path.insert(0,'tests')
import torch, transformers, tiny_native
from sartor.core.records import Message, Part
from sartor.models.media import MediaEmbedding
from sartor.models.native import whisper as W, parts
from sartor.models.native.turns import NativeChat
from sartor.models import adapters, batches, paths
tok=tiny_native.tokenizer(W.START,"<|notimestamps|>")
tok.chat_template=(W.TEMPLATE % "<|notimestamps|>").replace("<|endoftext|>","<|im_end|>")
i=tok.convert_tokens_to_ids
cfg=transformers.WhisperConfig(vocab_size=384,num_mel_bins=80,d_model=32,encoder_layers=2,decoder_layers=2,encoder_attention_heads=4,decoder_attention_heads=4,encoder_ffn_dim=64,decoder_ffn_dim=64,decoder_start_token_id=i(W.START),eos_token_id=2,bos_token_id=2,pad_token_id=2,init_std=.2,suppress_tokens=None,begin_suppress_tokens=None)
m=transformers.WhisperForConditionalGeneration(cfg).eval().requires_grad_(False)
md=W.WhisperMedia(transformers.WhisperFeatureExtractor(feature_size=80),m)
m.set_input_embeddings(MediaEmbedding(m.get_input_embeddings(),md))
chat=NativeChat(tok,md,[2])
p=tiny_native.part("audio",1)
e=chat.encode(tiny_native.row(p,reply="the light is on")); print(e.ids,e.learnt, chat.decode([t for t,l in zip(e.ids,e.learnt) if l]))
print(batches.row_losses(m,[e],"cpu"))
path=paths.choose(m,[e],torch.device("cpu")); print(path.name,path.reason)
pr=chat.prompt_ids([Message("user",(p,))]); print(pr)
from sartor.models.native.replies import _Chosen
print(W.reply(m,md,pr,[2],6,_Chosen(lambda s:int(s.argmax()))))
t=parts.choose(m,"all-linear",None,"none","none"); print(len(t.linear), t.linear[:6])
try:
    a=adapters.inject_lora(m,rank=2,alpha=4,dropout=0,targets=t,seed=0); print(batches.row_losses(a,[e],"cpu"))
except Exception as x: print("LORA",type(x),str(x)[:200])
