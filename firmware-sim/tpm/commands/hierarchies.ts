import { alg, command as code, handle as known } from '@fleetkey/tpm2/constants.ts'
import { command, handleAt, user, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import { freshLockout } from '../lockout.ts'
import { trimmed } from '../objects.ts'
import { digestBytes, hashOrNull, sizeOfHash, u32, yesNo } from '../readers.ts'
import { parameter, rc, Refusal } from '../refusal.ts'

/** TPM2_Clear: a new owner hierarchy; what was below it is lost. The counters of resets start again. */
const clear = ({ machine }: Call): void => {
  if (machine.durable.clearDisabled) throw new Refusal(rc.disabled)
  const platforms = <T>(of: Readonly<Record<string, T>>): Record<string, T> =>
    Object.fromEntries(Object.entries(of).filter(([handle]) => Number(handle) === known.platform))
  const isGone = (hierarchy: number): boolean => hierarchy === known.owner || hierarchy === known.endorsement
  for (const [handle, object] of machine.objects) if (object.kind === 'object' && isGone(object.hierarchy)) machine.objects.delete(handle)
  machine.nv.clearOwner()
  machine.pcrs.changed()
  machine.restartCount = 0
  machine.changed({
    ownerSeed: machine.random(32),
    proof: machine.random(32),
    endorsementProof: machine.random(32),
    auths: platforms(machine.durable.auths),
    policies: platforms(machine.durable.policies),
    persistent: new Map([...machine.durable.persistent].filter(([, { hierarchy }]) => !isGone(hierarchy))),
    lockout: freshLockout,
    clock: 0,
    clockSafe: true,
    resetCount: 0,
  })
}

const clearControl = (call: Call, disable: boolean): void => {
  if (handleAt(call, 0) === known.lockout && !disable) throw new Refusal(rc.authFail)
  call.machine.changed({ clearDisabled: disable })
}

const changeAuth = (call: Call, value: Uint8Array): void => {
  const auth = trimmed(value)
  if (auth.length > 64) throw parameter(1, rc.size)
  call.machine.changed({ auths: { ...call.machine.durable.auths, [String(handleAt(call, 0))]: auth } })
}

const setPolicy = (call: Call, { policy, hash }: { policy: Uint8Array; hash: number | null }): void => {
  if (policy.length !== (hash === null ? 0 : sizeOfHash(hash))) throw parameter(1, rc.size)
  const { policies } = call.machine.durable
  call.machine.changed({ policies: { ...policies, [String(handleAt(call, 0))]: { hash: hash ?? alg.null, digest: policy } } })
}

/** Hierarchies as a whole, and protection against guessing. */
export const hierarchyCommands: readonly (readonly [number, Command])[] = [
  [code.clear, command({ handles: [user(accepts.clear)], read: () => undefined, run: clear })],
  [code.clearControl, command({ handles: [user(accepts.clear)], read: (p) => p.take(yesNo), run: clearControl })],
  [code.hierarchyChangeAuth, command({ handles: [user(accepts.hierarchyAuth)], decrypt: true, read: (p) => p.take(digestBytes), run: changeAuth })],
  [
    code.setPrimaryPolicy,
    command({
      handles: [user(accepts.hierarchyAuth)],
      decrypt: true,
      read: (p) => ({ policy: p.take(digestBytes), hash: p.take(hashOrNull) }),
      run: setPolicy,
    }),
  ],
  [
    code.dictionaryAttackLockReset,
    command({
      handles: [user(accepts.lockout)],
      read: () => undefined,
      run: ({ machine }) => machine.changed({ lockout: { ...machine.durable.lockout, failedTries: 0 } }),
    }),
  ],
  [
    code.dictionaryAttackParameters,
    command({
      handles: [user(accepts.lockout)],
      read: (p) => ({ maxTries: p.take(u32), recoveryTime: p.take(u32), lockoutRecovery: p.take(u32) }),
      run: ({ machine }, parameters) => machine.changed({ lockout: { ...machine.durable.lockout, ...parameters } }),
    }),
  ],
]
