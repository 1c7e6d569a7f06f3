import type { BoardFacts, TpmKind } from './board.ts'

/** What somebody with his hands on the board can do, and what stands against it. */
export interface Protection {
  readonly threat: string
  readonly protected: 'yes' | 'partly' | 'no'
  readonly text: string
}

const storage: Protection = {
  threat: 'stolen or copied storage (SD card, disk)',
  protected: 'yes',
  text: 'every key on it is encrypted under a key that only this TPM gives out; the identity key cannot leave the TPM',
}

const sniffer: Protection = {
  threat: 'listening on the bus between processor and TPM',
  protected: 'yes',
  text: 'every session is salted to the endorsement key, secrets cross the bus encrypted both ways, every answer is checked',
}

const interposer: Protection = {
  threat: 'interposer: a device in the bus that changes what crosses it',
  protected: 'partly',
  text:
    "a changed command or answer inside a session is noticed, an EK that is not the chip's own fails at enrolment, and an agent that has enrolled goes on with the EK of then only. " +
    'Before its first enrolment it does not know which EK is right: an interposer that is there then can put a key of its own in its place, and reads what the sessions were to hide (passwords ' +
    "of hierarchies can be tried against what it sees; no key of Fleetkey's is there yet). " +
    "PCR extends are in the clear: it can also keep the firmware's measurements from the TPM and send others",
}

const reset: Protection = {
  threat: 'resetting the TPM alone (its RST# pin, a GPIO) while the processor runs on',
  protected: 'no',
  text:
    'all PCRs go back to zero, and software that runs can then extend what an approved firmware would have: the quote looks right. ' +
    "What is left: resetCount in every quote grows, the agent's sessions break and are noticed, the server asks for new evidence after a reset that it did not expect. " +
    'Tie RST# to the reset of the processor, so that neither is reset alone',
}

const relay: Protection = {
  threat: 'relay: a genuine TPM that answers for another machine',
  protected: 'partly',
  text:
    'evidence is bound to the TLS connection of the agent that asked, so that nobody passes it on to another connection. ' +
    'Whoever controls the board, or solders the module to another one, can still have this TPM quote what he extended there: a TPM says that it is genuine, not where it sits',
}

const root: Protection = {
  threat: 'root on the running system',
  protected: 'partly',
  text: 'keys with protection "tpm" and the identity cannot be taken away, but used as long as he is there; "sealed" keys and the TLS key are in memory and can be read',
}

const boot = ({ raspberryPi, signedBoot }: BoardFacts): Protection => {
  if (!raspberryPi)
    return {
      threat: 'changed firmware or kernel',
      protected: 'partly',
      text: 'what the firmware measures before it runs it is told from approved releases by its PCRs; the first code that measures is trusted without being measured',
    }
  if (signedBoot === true)
    return {
      threat: 'changed firmware or kernel',
      protected: 'yes',
      text: 'signed boot is on and its key is in the fuses: the boot ROM and bootloader accept only your images; what they start has to measure itself (U-Boot) to be seen by attestation',
    }
  return {
    threat: 'changed firmware or kernel',
    protected: 'partly',
    text:
      'the boot ROM and the bootloader of a Raspberry Pi measure nothing into the TPM: measuring begins in U-Boot. Whoever changes what runs before it, or U-Boot itself on the SD card, ' +
      'decides what is measured. Signed boot of the Pi (its key in the fuses) closes this; it is off here or not told by the bootloader',
  }
}

/** What a TPM of this kind on this board does and does not protect, honestly. Pure. */
export const protections = (kind: TpmKind, board: BoardFacts): readonly Protection[] => {
  switch (kind) {
    case 'discrete':
      return [storage, sniffer, interposer, reset, relay, boot(board), root]
    case 'firmware':
      return [
        storage,
        { threat: 'listening or interposing on a bus', protected: 'yes', text: 'there is no bus: the TPM is firmware in the processor' },
        {
          threat: 'resetting the TPM alone',
          protected: 'yes',
          text: "it is reset with the processor; but it is as strong as the processor's own firmware, keep that current",
        },
        relay,
        boot(board),
        root,
      ]
    case 'virtual':
      return [
        {
          threat: 'whoever runs the host',
          protected: 'no',
          text: 'the TPM is a program of the hypervisor or of this machine: its keys are in files that its administrator can read and copy',
        },
        relay,
        boot(board),
        root,
      ]
    case 'simulator':
      return [{ threat: 'everybody', protected: 'no', text: 'this is a simulator for tests and demonstrations: its keys are in a file' }]
    case 'unknown':
      return [
        storage,
        {
          threat: 'bus, reset, interposer',
          protected: 'partly',
          text: 'it could not be told whether this TPM is a chip of its own or firmware: take it for a chip',
        },
        interposer,
        reset,
        relay,
        boot(board),
        root,
      ]
  }
}
