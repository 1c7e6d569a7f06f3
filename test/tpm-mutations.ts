import { concat, empty, Reader, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known } from '@fleetkey/tpm2/constants.ts'
import { wrapForImport } from '@fleetkey/tpm2/import.ts'
import { nvAttribute as a } from '@fleetkey/firmware-sim/tpm/nv.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import type { Subject } from './tpm-pair.ts'
import { commandBytes, password, type Step } from './tpm-script.ts'
import {
  attestation,
  create,
  createPrimary,
  creation,
  load,
  macKey,
  nullHandle,
  nullScheme,
  owner,
  Recorder,
  sealed,
  signing,
  storage,
} from './tpm-scenarios/recorder.ts'

const hash32 = new Uint8Array(32).fill(5)
const bank = marshalPcrSelection([{ hash: alg.sha256, pcrs: [0, 7] }])
const nvIndex = 0x0150_0000
const nvArea = (index: number): Uint8Array =>
  concat(u32(index), u16(alg.sha256), u32(a.ownerRead | a.ownerWrite | a.authRead | a.authWrite | a.noDA), sized(empty), u16(32))

/** What the commands below need on a TPM: two objects loaded (one slot stays free), a policy session, an NV index, a blob, a context, a duplicate. */
interface Ground {
  readonly parent: number
  readonly key: number
  readonly session: number
  readonly private: Uint8Array
  readonly public: Uint8Array
  readonly context: Uint8Array
  readonly signature: Uint8Array
  readonly keyName: Uint8Array
  readonly duplicate: ReturnType<typeof wrapForImport>
}

export const prepare = async (subject: Subject, random: (length: number) => Uint8Array): Promise<Ground> => {
  const { tpm } = subject
  const on = new Recorder(subject)
  const parent = await on.primary(owner, storage)
  const made = new Reader((await tpm.must(create(parent.handle, signing))).parameters)
  const [privateBytes, publicBytes] = [made.sized().slice(), made.sized().slice()]
  const { handle } = await tpm.must(load(parent.handle, privateBytes, publicBytes))
  const ticket = concat(u16(0x8024), u32(nullHandle), sized(empty))
  const signed = await tpm.must({ code: command.sign, handles: [handle], auth: [password()], parameters: concat(sized(hash32), nullScheme, ticket) })
  const context = (await tpm.must({ code: command.contextSave, handles: [handle] })).parameters.slice()
  await tpm.must({ code: command.nvDefineSpace, handles: [owner], auth: [password()], parameters: concat(sized(empty), sized(nvArea(nvIndex))) })
  await tpm.must({ code: command.nvWrite, handles: [owner, nvIndex], auth: [password()], parameters: concat(sized(hash32), u16(0)) })
  const session = await tpm.session('policy')
  return {
    parent: parent.handle,
    key: handle,
    session: session.handle,
    private: privateBytes,
    public: publicBytes,
    context,
    signature: signed.parameters.slice(),
    keyName: nameOf(publicBytes),
    duplicate: wrapForImport({ parent: parent.public, key: new Uint8Array(32).fill(1), authPolicy: null, random }),
  }
}

const authorised = (code: number, handles: readonly number[], parameters: Uint8Array = empty, count = 1): Step => ({
  code,
  handles,
  auth: Array.from({ length: count }, () => password()),
  parameters,
})

/** Good commands, one per kind; the same on every TPM but for what only that TPM can have made. */
const good: readonly ((on: Ground) => Step)[] = [
  () => ({ code: command.getRandom, parameters: u16(8) }),
  () => ({ code: command.selfTest, parameters: Uint8Array.of(1) }),
  () => ({ code: command.getCapability, parameters: concat(u32(6), u32(0x100), u32(4)) }),
  () => ({ code: command.readClock }),
  () => ({ code: command.pcrRead, parameters: bank }),
  () => ({ code: command.testParms, parameters: concat(u16(alg.keyedhash), nullScheme) }),
  () => ({ code: command.hash, parameters: concat(sized(hash32), u16(alg.sha256), u32(owner)) }),
  () => authorised(command.pcrExtend, [4], concat(u32(1), u16(alg.sha256), hash32)),
  () => authorised(command.pcrEvent, [4], sized(hash32)),
  () => authorised(command.pcrReset, [16]),
  () => createPrimary(owner, storage),
  () => createPrimary(known.endorsement, templates.ekEcc),
  () => createPrimary(known.endorsement, attestation),
  (on) => authorised(command.create, [on.parent], creation(signing)),
  (on) => authorised(command.create, [on.parent], creation(sealed, { data: hash32 })),
  (on) => authorised(command.create, [on.parent], creation(macKey, { data: hash32, auth: hash32 })),
  (on) => load(on.parent, on.private, on.public),
  (on) => ({ code: command.loadExternal, parameters: concat(sized(empty), sized(on.public), u32(owner)) }),
  (on) => ({ code: command.readPublic, handles: [on.key] }),
  (on) =>
    authorised(
      command.import,
      [on.parent],
      concat(
        sized(on.duplicate.innerKey),
        sized(on.duplicate.public),
        sized(on.duplicate.duplicate),
        sized(on.duplicate.seed),
        u16(alg.aes),
        u16(128),
        u16(alg.cfb),
      ),
    ),
  (on) => authorised(command.sign, [on.key], concat(sized(hash32), nullScheme, u16(0x8024), u32(nullHandle), sized(empty))),
  (on) => ({ code: command.verifySignature, handles: [on.key], parameters: concat(sized(hash32), on.signature) }),
  (on) => authorised(command.quote, [on.key], concat(sized(hash32), nullScheme, bank)),
  (on) => authorised(command.certify, [on.parent, on.key], concat(sized(hash32), nullScheme), 2),
  (on) => authorised(command.getTime, [known.endorsement, on.key], concat(sized(hash32), nullScheme), 2),
  (on) => ({ code: command.makeCredential, handles: [on.parent], parameters: concat(sized(hash32), sized(on.keyName)) }),
  (on) => authorised(command.activateCredential, [on.key, on.parent], concat(sized(new Uint8Array(66)), sized(new Uint8Array(68))), 2),
  (on) => authorised(command.objectChangeAuth, [on.key, on.parent], sized(hash32)),
  (on) => ({ code: command.contextSave, handles: [on.key] }),
  (on) => ({ code: command.contextLoad, parameters: on.context }),
  (on) => ({ code: command.flushContext, parameters: u32(on.key) }),
  (on) => authorised(command.evictControl, [owner, on.key], u32(0x8100_0001)),
  () => ({
    code: command.startAuthSession,
    handles: [nullHandle, nullHandle],
    parameters: concat(sized(new Uint8Array(16)), sized(empty), Uint8Array.of(1), u16(alg.aes), u16(128), u16(alg.cfb), u16(alg.sha256)),
  }),
  (on) => authorised(command.policySecret, [known.endorsement, on.session], concat(sized(empty), sized(empty), sized(empty), u32(0))),
  (on) => ({ code: command.policyPcr, handles: [on.session], parameters: concat(sized(empty), bank) }),
  (on) => ({ code: command.policyOr, handles: [on.session], parameters: concat(u32(2), sized(new Uint8Array(32)), sized(hash32)) }),
  (on) => ({ code: command.policyCommandCode, handles: [on.session], parameters: u32(command.unseal) }),
  (on) => ({
    code: command.policyAuthorize,
    handles: [on.session],
    parameters: concat(sized(new Uint8Array(32)), sized(empty), sized(on.keyName), u16(0x8022), u32(owner), sized(new Uint8Array(64))),
  }),
  (on) => ({ code: command.policyAuthValue, handles: [on.session] }),
  (on) => ({ code: command.policyGetDigest, handles: [on.session] }),
  (on) => ({ code: command.policyRestart, handles: [on.session] }),
  () => authorised(command.nvDefineSpace, [owner], concat(sized(empty), sized(nvArea(nvIndex + 1)))),
  () => ({ code: command.nvReadPublic, handles: [nvIndex] }),
  () => authorised(command.nvWrite, [owner, nvIndex], concat(sized(hash32), u16(0))),
  () => authorised(command.nvRead, [owner, nvIndex], concat(u16(32), u16(0))),
  () => authorised(command.nvUndefineSpace, [owner, nvIndex]),
  () => authorised(command.hierarchyChangeAuth, [owner], sized(hash32)),
  () => authorised(command.dictionaryAttackLockReset, [known.lockout]),
  () => authorised(command.dictionaryAttackParameters, [known.lockout], concat(u32(10), u32(100), u32(100))),
  () => authorised(command.clear, [known.platform]),
  () => ({ code: command.hashSequenceStart, parameters: concat(sized(empty), u16(alg.sha256)) }),
]

export interface Mutation {
  readonly which: number
  /** Applied to the bytes that each TPM's own command has. */
  readonly change: (bytes: Uint8Array) => Uint8Array
  readonly told: string
}

const interesting = [0, 1, 2, 3, 4, 0x0b, 0x10, 0x7f, 0x80, 0xff]

/** A number below `below` from a generator that a seed starts: the run can be repeated. */
export type Dice = (below: number) => number

export const dice = (seed: number): Dice => {
  let state = seed >>> 0
  return (below) => {
    // mulberry32
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below
  }
}

/** The header says how long the command is: a stream can carry no other (swtpm waits for the rest). Wrong sizes are in the scenario of framing. */
const resized = (bytes: Uint8Array): Uint8Array => concat(bytes.subarray(0, 2), u32(bytes.length), bytes.subarray(6))

/** One mutation: a flipped bit, another byte, a cut, an insertion; sometimes two. `length` of the command that it is for. */
export const mutate = (roll: Dice, length: number): Mutation['change'] => {
  const at = roll(length)
  // A stream cannot carry a command without its header, so cuts and insertions are behind it.
  const behind = Math.max(10, at)
  const one = ((): Mutation['change'] => {
    switch (roll(6)) {
      case 0:
      case 1: {
        const bit = 1 << roll(8)
        return (bytes) => resized(bytes.map((byte, place) => (place === at ? byte ^ bit : byte)))
      }
      case 2:
      case 3: {
        const value = interesting[roll(interesting.length)] ?? 0
        return (bytes) => resized(bytes.map((byte, place) => (place === at ? value : byte)))
      }
      case 4: {
        const most = roll(8) + 1
        return (bytes) => resized(concat(bytes.subarray(0, behind), bytes.subarray(behind + most)))
      }
      default: {
        const value = interesting[roll(interesting.length)] ?? 0
        return (bytes) => resized(concat(bytes.subarray(0, behind), Uint8Array.of(value), bytes.subarray(behind)))
      }
    }
  })()
  if (roll(5) > 0) return one
  const other = mutate(roll, length)
  return (bytes) => other(one(bytes))
}

export const kinds = good.length
export const bytesFor = (which: number, on: Ground): Uint8Array => commandBytes((good[which] as (on: Ground) => Step)(on)).bytes
export type { Ground }

const code = command
/** What has to be done after a command that succeeded, so that both TPMs stand as before: nothing, a flush of what it gave, a restart of the policy. */
const harmless: ReadonlySet<number> = new Set([
  code.getRandom,
  code.selfTest,
  code.getCapability,
  code.readClock,
  code.pcrRead,
  code.testParms,
  code.hash,
  code.pcrExtend,
  code.pcrEvent,
  code.pcrReset,
  code.create,
  code.readPublic,
  code.import,
  code.sign,
  code.verifySignature,
  code.quote,
  code.certify,
  code.certifyCreation,
  code.getTime,
  code.makeCredential,
  code.activateCredential,
  code.objectChangeAuth,
  code.nvReadPublic,
  code.nvRead,
  code.nvWrite,
  code.policyGetDigest,
  code.dictionaryAttackLockReset,
  code.hmac,
  code.unseal,
  code.ecdhKeyGen,
  code.ecdhZGen,
  code.getTestResult,
  code.stirRandom,
  code.incrementalSelfTest,
  code.shutdown,
])
const gives: ReadonlySet<number> = new Set([code.createPrimary, code.load, code.loadExternal, code.startAuthSession, code.hashSequenceStart, code.hmacStart])
const policies: ReadonlySet<number> = new Set([
  code.policySecret,
  code.policyPcr,
  code.policyOr,
  code.policyCommandCode,
  code.policyAuthorize,
  code.policyAuthValue,
  code.policyPassword,
  code.policyRestart,
  code.policyLocality,
  code.policyNvWritten,
  code.policyCpHash,
  code.policyNameHash,
  code.policyDuplicationSelect,
])

/** Brings a TPM back to where it was before this successful command; false when only starting over does. */
export const undo = async (subject: Subject, on: Ground, of: { command: Uint8Array; response: Uint8Array }): Promise<boolean> => {
  const number = Buffer.from(of.command).readUInt32BE(6)
  if (harmless.has(number)) return true
  if (gives.has(number)) return (await subject.tpm.run({ code: code.flushContext, parameters: of.response.subarray(10, 14) })).rc === 0
  if (policies.has(number)) return (await subject.tpm.run({ code: code.policyRestart, handles: [on.session] })).rc === 0
  return false
}

/** Class of a response code: success, a warning, a format-zero error, or a format-one error about a parameter, handle or session. */
export const classOf = (rc: number): string => {
  if (rc === 0) return 'success'
  if ((rc & 0x080) !== 0) return (rc & 0x40) !== 0 ? 'parameter' : (rc & 0xf00) === 0 ? 'format one' : (rc & 0x800) !== 0 ? 'session' : 'handle'
  return (rc & 0xf00) === 0x900 ? 'warning' : 'format zero'
}
