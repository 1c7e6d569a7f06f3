import { command as code } from '@fleetkey/tpm2/constants.ts'
import { capability } from './capability.ts'
import { command, type Command } from './command.ts'
import { attestationCommands } from './commands/attestation.ts'
import { contextCommands } from './commands/contexts.ts'
import { duplicationCommands } from './commands/duplication.ts'
import { hashingCommands } from './commands/hashing.ts'
import { hierarchyCommands } from './commands/hierarchies.ts'
import { nvCommands } from './commands/nv.ts'
import { objectCommands } from './commands/objects.ts'
import { pcrCommands } from './commands/pcr.ts'
import { policyCommands } from './commands/policy.ts'
import { sessionCommands } from './commands/sessions.ts'
import { signingCommands } from './commands/signing.ts'
import { startupCommands } from './commands/startup.ts'
import type { Input } from './input.ts'
import { u32 } from './readers.ts'
import { rc, Refusal } from './refusal.ts'

/** TPM_CAP (Part 2 §6.12); 10 and 256 are known and have nothing here. */
const capabilityNumber = (input: Input): number => {
  const which = input.u32()
  if (which > 10 && which !== 0x100) throw new Refusal(rc.value)
  return which
}

/** Every command that the TPM knows, by its code. */
export const commands: ReadonlyMap<number, Command> = new Map<number, Command>([
  [
    code.getCapability,
    command({
      handles: [],
      read: (p) => ({ which: p.take(capabilityNumber), property: p.take(u32), count: p.take(u32) }),
      run: ({ machine }, asked) => ({ parameters: capability(machine, [...commands], asked) }),
    }),
  ],
  ...startupCommands,
  ...sessionCommands,
  ...policyCommands,
  ...objectCommands,
  ...duplicationCommands,
  ...contextCommands,
  ...attestationCommands,
  ...signingCommands,
  ...hashingCommands,
  ...pcrCommands,
  ...nvCommands,
  ...hierarchyCommands,
])
