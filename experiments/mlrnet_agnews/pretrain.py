"""Pretrains a small BERT on the texts of AG News alone, without their labels: python pretrain.py DIR [EPOCHS].

Masked language modelling (Devlin et al., "BERT", 2019) on the training file in the folder that METAKERN_DATA names. DIR
then holds the encoder and its tokenizer as the transformers package saves them, for `--model transformers:DIR`.
"""

import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    get_linear_schedule_with_warmup,
)

from metakern.data.text import ag_news

LENGTH, BATCH, LEARNING_RATE, WARMUP = 64, 64, 1e-3, 0.1
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}


def batches(tokenizer: BertTokenizer, texts: list[str]):
    """One epoch in a random order; a new mask each time, 15 % of the positions."""
    mask = DataCollatorForLanguageModeling(tokenizer)
    for chosen in torch.randperm(len(texts)).split(BATCH):
        rows = tokenizer([texts[k] for k in chosen.tolist()], truncation=True, max_length=LENGTH)
        yield mask([{"input_ids": row} for row in rows["input_ids"]])


def masked_loss(model: BertForMaskedLM, batch) -> torch.Tensor:
    """The vocabulary's product is taken at the masked positions only, one in seven."""
    hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    masked = batch["labels"] != -100
    return torch.nn.functional.cross_entropy(model.cls(hidden[masked]), batch["labels"][masked])


def main() -> None:
    folder, epochs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30
    torch.manual_seed(0)
    texts = ag_news(Path(os.environ["METAKERN_DATA"])).readable
    tokenizer = BertTokenizer().train_new_from_iterator(texts, vocab_size=8000)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = epochs * -(-len(texts) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    with tqdm(total=steps) as progress:
        for _ in range(epochs):
            for batch in batches(tokenizer, texts):
                loss = masked_loss(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                progress.update()
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
