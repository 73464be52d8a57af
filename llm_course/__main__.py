"`python -m llm_course STAGE` is `llm-course STAGE`; `torchrun -m llm_course train` needs this form."
from llm_course.cli import main

main()
