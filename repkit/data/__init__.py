"""Data: digit scenes and tasks on them, sources of examples, the tokenizer, augmentation, and the pipeline.

Nothing is imported here, because each module brings its own libraries (`pip install "repkit[data]"` installs them all):

| module | what it holds | needs |
|---|---|---|
| `scenes` | vocabulary, captions, `zero_shot_prompts`, composition of scenes | scikit-learn, to compose |
| `scene_tasks` | the generation tasks `TASKS`: questions, captions, translation | scikit-learn, to compose |
| `scene_classes` | classification: `CLASS_TASKS`: statements, assignment, entailment | scikit-learn, to compose |
| `scene_questions`, `scene_translation`, `scene_statements`, `scene_assignment`, `scene_entailment` | their grammar | |
| `scene_demands` | scenes made to order | |
| `digit_scenes` | the TFDS builder `DigitScenes` | tensorflow-datasets, Pillow |
| `sources` | `digit_scenes_source`, `tfds_source`, `jsonl_source`, `all_captions` | tensorflow-datasets, Pillow |
| `sequence_sources` | `scene_task_source`, `jsonl_sequence_source`, `all_texts` | tensorflow-datasets, Pillow |
| `class_sources` | `scene_class_source`, `questions_as_classes`, `common_answers` | tensorflow-datasets, Pillow |
| `published` | `coco_captions_source`, `vqa_source` and other data sets' files | tensorflow-datasets, Pillow |
| `images` | `load_image` | Pillow |
| `tokenizer` | `Tokenizer`, `train_tokenizer`, `load_tokenizer` | tokenizers |
| `augment` | `Augmentation`, `augment_images`, `augment_texts` | |
| `pipeline` | `make_batches` (also of sequences, classes), `Batches`, `caption_table` | grain, Pillow, tokenizers |
"""
