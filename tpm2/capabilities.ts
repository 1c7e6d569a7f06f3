import { TpmFormatError, type Reader } from './bytes.ts'
import { alg, command, curve } from './constants.ts'
import type { Tpm } from './tpm.ts'

/** TPM_CAP (Part 2 §6.12). */
const cap = { algorithms: 0, handles: 1, commands: 2, pcrs: 5, properties: 6, curves: 8 } as const
/** A TPM that always has more to tell is not listened to for ever. */
const maxPages = 32
const perPage = 64

/** TPM_PT (Part 2 §6.13), the ones that are looked at. */
export const property = {
  revision: 0x102,
  year: 0x104,
  manufacturer: 0x105,
  vendorString: 0x106,
  firmware1: 0x10b,
  firmware2: 0x10c,
  inputBuffer: 0x10d,
  transientMin: 0x10e,
  persistentMin: 0x10f,
  loadedMin: 0x110,
  clockUpdate: 0x119,
  maxCommand: 0x11e,
  maxResponse: 0x11f,
  maxDigest: 0x120,
  nvBufferMax: 0x12c,
  permanent: 0x200,
  startupClear: 0x201,
  transientAvailable: 0x207,
  loadedAvailable: 0x204,
  lockoutCounter: 0x20e,
  maxAuthFail: 0x20f,
  lockoutInterval: 0x210,
  lockoutRecovery: 0x211,
} as const

/** All of a paged list: `read` takes one item and says its number, which has to grow from page to page. */
const all = async <T>(tpm: Tpm, of: { which: number; first: number; read: (list: Reader) => T; number: (item: T) => number }): Promise<readonly T[]> => {
  const items: T[] = []
  for (let page = 0, next = of.first; ; page++) {
    const { more, list } = await tpm.capability(of.which, next, perPage)
    const count = list.u32()
    if (count > 1024) throw new TpmFormatError(`a capability of ${count} items`)
    for (let at = 0; at < count; at++) items.push(of.read(list))
    const last = items.at(-1)
    if (!more || count === 0 || last === undefined) return items
    if (of.number(last) < next || page >= maxPages) throw new TpmFormatError('a capability list that does not end')
    next = of.number(last) + 1
  }
}

/** TPM_CAP_TPM_PROPERTIES of the fixed (0x100) or the variable (0x200) group. */
export const properties = async (tpm: Tpm, group: 0x100 | 0x200): Promise<ReadonlyMap<number, number>> => {
  const pairs = await all(tpm, {
    which: cap.properties,
    first: group,
    read: (list): readonly [number, number] => [list.u32(), list.u32()],
    number: ([id]) => id,
  })
  return new Map(pairs.filter(([id]) => id >>> 8 === group >>> 8))
}

/** Command codes that the TPM implements. */
export const commandsOf = async (tpm: Tpm): Promise<ReadonlySet<number>> => {
  // TPMA_CC: the code is in the lower half, vendors' own have bit 29.
  const attributes = await all(tpm, { which: cap.commands, first: 0, read: (list) => list.u32(), number: (one) => one & 0xffff })
  return new Set(attributes.filter((one) => (one & 0x2000_0000) === 0).map((one) => one & 0xffff))
}

export const algorithmsOf = async (tpm: Tpm): Promise<ReadonlySet<number>> =>
  new Set(
    await all(tpm, {
      which: cap.algorithms,
      first: 0,
      read: (list) => {
        const id = list.u16()
        list.u32()
        return id
      },
      number: (id) => id,
    }),
  )

export const curvesOf = async (tpm: Tpm): Promise<ReadonlySet<number>> =>
  new Set(await all(tpm, { which: cap.curves, first: 0, read: (list) => list.u16(), number: (id) => id }))

/** PCR banks with the PCRs that are allocated in each; a bank without any is switched off. */
export const banksOf = async (tpm: Tpm): Promise<readonly { readonly hash: number; readonly pcrs: readonly number[] }[]> => {
  const { list } = await tpm.capability(cap.pcrs, 0, 1)
  const count = list.u32()
  if (count > 16) throw new TpmFormatError(`${count} PCR banks`)
  // Not structures.ts' reader: a chip may have banks of hashes that Fleetkey does not know (SM3, SHA-3).
  return Array.from({ length: count }, () => {
    const hash = list.u16()
    const bits = list.bytes(list.u8())
    return { hash, pcrs: Array.from({ length: bits.length * 8 }, (_, pcr) => pcr).filter((pcr) => (((bits[pcr >> 3] ?? 0) >> (pcr & 7)) & 1) === 1) }
  })
}

export interface Missing {
  readonly name: string
  /** What cannot be done without it. */
  readonly for: string
  /** The agent cannot work at all. */
  readonly needed: boolean
}

const must = (code: keyof typeof command, purpose: string) => ({ code, purpose, needed: true }) as const
const may = (code: keyof typeof command, purpose: string) => ({ code, purpose, needed: false }) as const

/** Commands that the agent uses, and what for. Most are mandatory for a PC client TPM; what is not is found out here and never by a refusal in the field. */
const uses = [
  must('createPrimary', 'every key'),
  must('create', 'the identity key'),
  must('load', 'the identity key'),
  must('flushContext', 'every key'),
  must('startAuthSession', 'protecting what crosses the bus'),
  must('policySecret', 'using the endorsement key'),
  must('activateCredential', 'enrolment'),
  must('quote', 'attestation'),
  must('certify', 'attestation'),
  must('pcrRead', 'attestation'),
  must('readClock', 'noticing a reset'),
  must('sign', 'the identity key'),
  must('ecdhZGen', 'opening what is wrapped to the recipient key'),
  must('unseal', 'the storage key'),
  must('nvReadPublic', 'the EK certificate'),
  must('nvRead', 'the EK certificate'),
  must('getRandom', 'making keys'),
  may('import', 'keys with protection "tpm"'),
  may('hmac', 'keys with protection "tpm"'),
  may('hmacStart', 'MACs over more than 1,024 bytes with keys of protection "tpm"'),
  may('sequenceUpdate', 'MACs over more than 1,024 bytes with keys of protection "tpm"'),
  may('sequenceComplete', 'MACs over more than 1,024 bytes with keys of protection "tpm"'),
  may('policyPcr', 'keys that work only under approved firmware'),
  may('policyAuthorize', 'keys that work only under approved firmware'),
  may('loadExternal', 'keys that work only under approved firmware'),
  may('verifySignature', 'keys that work only under approved firmware'),
  may('dictionaryAttackLockReset', 'fleetkey-agent tpm reset-lockout'),
] as const

const algorithms = [
  { id: alg.ecc, name: 'ECC', purpose: 'every key', needed: true },
  { id: alg.ecdsa, name: 'ECDSA', purpose: 'the identity key and attestation', needed: true },
  { id: alg.ecdh, name: 'ECDH', purpose: 'the recipient key', needed: true },
  { id: alg.sha256, name: 'SHA-256', purpose: 'every key', needed: true },
  { id: alg.aes, name: 'AES', purpose: 'protecting what crosses the bus', needed: true },
  { id: alg.cfb, name: 'CFB', purpose: 'protecting what crosses the bus', needed: true },
  { id: alg.keyedhash, name: 'KEYEDHASH', purpose: 'the storage key', needed: true },
  { id: alg.hmac, name: 'HMAC', purpose: 'keys with protection "tpm"', needed: false },
] as const

const pascal = (code: string): string => `TPM2_${code.charAt(0).toUpperCase()}${code.slice(1)}`
const special: Readonly<Record<string, string>> = {
  ecdhZGen: 'TPM2_ECDH_ZGen',
  hmac: 'TPM2_HMAC',
  hmacStart: 'TPM2_HMAC_Start',
  pcrRead: 'TPM2_PCR_Read',
  policyPcr: 'TPM2_PolicyPCR',
  nvRead: 'TPM2_NV_Read',
  nvReadPublic: 'TPM2_NV_ReadPublic',
}
/** The specification's name of a command. */
export const specName = (code: keyof typeof command): string => special[code] ?? pascal(code)

/** What the agent wants and this TPM does not have, by name. Pure. */
export const missingIn = (of: {
  readonly commands: ReadonlySet<number>
  readonly algorithms: ReadonlySet<number>
  readonly curves: ReadonlySet<number>
  readonly banks: readonly { readonly hash: number; readonly pcrs: readonly number[] }[]
}): readonly Missing[] => {
  const bank = of.banks.find(({ hash }) => hash === alg.sha256)
  return [
    ...algorithms.filter(({ id }) => !of.algorithms.has(id)).map(({ name, purpose, needed }) => ({ name, for: purpose, needed })),
    ...(of.curves.has(curve.p256) ? [] : [{ name: 'curve P-256', for: 'every key', needed: true }]),
    ...(bank === undefined ? [{ name: 'SHA-256 PCR bank', for: 'attestation', needed: true }] : []),
    ...(bank?.pcrs.length === 0 ? [{ name: 'SHA-256 PCR bank (present, but switched off)', for: 'attestation', needed: true }] : []),
    ...uses.filter(({ code }) => !of.commands.has(command[code])).map(({ code, purpose, needed }) => ({ name: specName(code), for: purpose, needed })),
  ]
}
