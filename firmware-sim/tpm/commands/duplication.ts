import { concat, empty, sized } from '@fleetkey/tpm2/bytes.ts'
import { attribute, command as code } from '@fleetkey/tpm2/constants.ts'
import type { Symmetric } from '@fleetkey/tpm2/structures.ts'
import { loadChecks } from '../checks.ts'
import { command, duplicate, named, objectAt, objectOrNullAt, user, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import { has, isParent, isStorage } from '../objects.ts'
import { dataBytes, privateBytes, publicSized, secretBytes, symmetricObject } from '../readers.ts'
import { asParameter, handleFault, parameter, rc } from '../refusal.ts'
import { receiveSeed, shareSeedWith, unwrapDuplicate, wrapDuplicate, wrapPrivate } from '../wrapping.ts'

/** What the inner wrapper's algorithm says of its key. */
const checkInnerKey = (symmetric: Symmetric | null, key: Uint8Array, mayBeEmpty: boolean): void => {
  const length = symmetric === null ? 0 : symmetric.keyBits / 8
  if (key.length !== length && !(mayBeEmpty && key.length === 0)) throw parameter(1, rc.size)
}

const runDuplicate = (call: Call, { encryptionKey, symmetric }: { encryptionKey: Uint8Array; symmetric: Symmetric | null }): { parameters: Uint8Array } => {
  const { machine } = call
  const [object, newParent] = [objectAt(call, 0), objectOrNullAt(call, 1)]
  if (has(object, attribute.fixedParent)) throw handleFault(1, rc.attributes)
  if (newParent !== null && !isStorage(newParent)) throw handleFault(2, rc.type)
  if (has(object, attribute.encryptedDuplication)) {
    if (symmetric === null) throw parameter(2, rc.symmetric)
    if (newParent === null) throw handleFault(2, rc.hierarchy)
  }
  checkInnerKey(symmetric, encryptionKey, true)
  const { seed, secret } = newParent === null ? { seed: empty, secret: empty } : shareSeedWith(newParent.public, 'DUPLICATE', machine.random)
  // A key for the inner wrapper that was not given is made here, and told.
  const made = symmetric !== null && encryptionKey.length === 0
  const innerKey = made ? machine.random(symmetric.keyBits / 8) : encryptionKey
  const { sensitive } = object
  if (sensitive === null) throw handleFault(1, rc.type)
  const duplicated = wrapDuplicate(newParent?.public ?? null, { key: object.public, sensitive, seed, innerKey })
  return { parameters: concat(sized(made ? innerKey : empty), sized(duplicated), sized(secret)) }
}

/** Objects that leave a parent for another, and keys that come from outside. */
export const duplicationCommands: readonly (readonly [number, Command])[] = [
  [
    code.duplicate,
    command({
      handles: [duplicate(accepts.object), named(accepts.objectOrNull)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ encryptionKey: p.take(dataBytes), symmetric: p.take(symmetricObject) }),
      run: runDuplicate,
    }),
  ],
  [
    code.import,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({
        encryptionKey: p.take(dataBytes),
        key: p.take(publicSized),
        duplicated: p.take(privateBytes),
        secret: p.take(secretBytes),
        symmetric: p.take(symmetricObject),
      }),
      run(call, { encryptionKey, key, duplicated, secret, symmetric }) {
        if ((key.attributes & (attribute.fixedTPM | attribute.fixedParent)) !== 0) throw parameter(2, rc.attributes)
        const parent = objectAt(call, 0)
        if (!isParent(parent)) throw handleFault(1, rc.type)
        checkInnerKey(symmetric, encryptionKey, false)
        const strict = (key.attributes & attribute.encryptedDuplication) !== 0
        if (strict && symmetric === null) throw parameter(1, rc.attributes)
        if (strict && secret.length === 0) throw parameter(4, rc.attributes)
        const seed = secret.length === 0 ? empty : asParameter(4, () => receiveSeed(parent, secret, 'DUPLICATE'))
        const sensitive = asParameter(3, () => unwrapDuplicate(parent.public, { key, duplicate: duplicated, seed, innerKey: encryptionKey }))
        if (has(parent, attribute.fixedTPM))
          loadChecks({ parent: null, key, sensitive, type: sensitive.type, checkKeys: true, blame: { public: 2, sensitive: 3 } })
        return { parameters: sized(wrapPrivate(parent, key, sensitive, call.machine.random)) }
      },
    }),
  ],
]
