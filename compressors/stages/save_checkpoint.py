"""Save the checkpoint of a run: all processes write weights, the first one all other files."""

from lrc.compressors.checkpoint.assemble import write_checkpoint, write_tensors
from lrc.compressors.compress.layerwise import layer_file
from lrc.compressors.heal.trained_files import trained_tensors
from lrc.compressors.io.files import new_folder, partial_path, storage_errors
from lrc.compressors.io.fingerprint import known_hashes, learn_hashes
from lrc.compressors.planning.plan import Plan
from lrc.compressors.session import Session
from lrc.configs.load import LoadedRecipe


def save_checkpoint(session: Session, plan: Plan, loaded: LoadedRecipe) -> None:
    """Write the checkpoint of a plan with results, completely or not at all."""
    with session.clock("save"), new_folder(session.checkpoint) as folder:
        session.in_all_processes(_write_tensors, plan)
        write_checkpoint(
            folder,
            plan=plan,
            loaded=loaded,
            source=session.prepared.source,
            architecture=session.models.architecture,
            reader=session.models.reader,
            tokenizer=session.prepared.tokenizer,
            user_plans=session.prepared.user_plans,
        )


def _write_tensors(session: Session, plan: Plan) -> None:
    processes = session.processes
    with storage_errors(session.checkpoint):
        written = write_tensors(
            partial_path(session.checkpoint),  # the folder that the first process has made
            plan=plan,
            architecture=session.models.architecture,
            reader=session.models.reader,
            compressed=lambda layer, name: session.journal.read_tensor(layer_file(layer), name),
            trained=trained_tensors(session.journal, plan),
            processes=processes,
        )
        # The manifest lists the hash of every file, and each process compares them on loading.
        if not processes.alone:
            for found in processes.gather(known_hashes(written)):
                learn_hashes(found)
