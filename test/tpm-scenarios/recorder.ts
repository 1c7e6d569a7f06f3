import { concat, empty, Reader, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command, curve, handle as known } from '@fleetkey/tpm2/constants.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { marshalPublic, type EccPublic, type KeyedHashPublic, type Public } from '@fleetkey/tpm2/structures.ts'
import type { Subject } from '../tpm-pair.ts'
import { password, type Outcome, type Step } from '../tpm-script.ts'

export interface Loaded {
  readonly handle: number
  readonly name: Uint8Array
  readonly public: Uint8Array
  readonly private: Uint8Array
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')

/** What is compared of a response; `length` unless the implementation may choose it. */
interface Look {
  readonly label: string
  readonly length?: false
  readonly see?: (parameters: Reader) => unknown
}

/** Runs steps on one TPM and notes what must be the same on every TPM: response code, length, and what a step says. */
export class Recorder {
  readonly subject: Subject
  readonly seen: unknown[] = []

  constructor(subject: Subject) {
    this.subject = subject
  }

  async step(look: Look | string, step: Step): Promise<Outcome> {
    const of = typeof look === 'string' ? { label: look } : look
    const outcome = await this.subject.tpm.run(step)
    const seen = of.see !== undefined && outcome.rc === 0 ? of.see(new Reader(outcome.parameters)) : undefined
    this.seen.push({
      label: of.label,
      rc: outcome.rc.toString(16),
      ...(of.length === false ? {} : { length: outcome.raw.length }),
      ...(seen === undefined ? {} : { seen: seen instanceof Uint8Array ? hex(seen) : seen }),
    })
    return outcome
  }

  /** Raw bytes; the response code. */
  async raw(label: string, bytes: Uint8Array): Promise<void> {
    const response = new Reader(await this.subject.tpm.raw(bytes))
    const [tag, size, rc] = [response.u16(), response.u32(), response.u32()]
    this.seen.push({ label, tag: tag.toString(16), size, rc: rc.toString(16) })
  }

  note(label: string, value: unknown): void {
    this.seen.push({ label, value: value instanceof Uint8Array ? hex(value) : value })
  }

  async primary(hierarchy: number, template: Public, auth: Uint8Array = empty): Promise<Loaded> {
    const { handle, parameters } = await this.subject.tpm.must(createPrimary(hierarchy, template, { auth }))
    const publicBytes = new Reader(parameters).sized().slice()
    return { handle, public: publicBytes, name: nameOf(publicBytes), private: empty }
  }

  async child(parent: Loaded, template: Public, of: { auth?: Uint8Array; data?: Uint8Array } = {}): Promise<Loaded> {
    const made = await this.subject.tpm.must(create(parent.handle, template, of))
    const reader = new Reader(made.parameters)
    const [privateBytes, publicBytes] = [reader.sized().slice(), reader.sized().slice()]
    const { handle } = await this.subject.tpm.must(load(parent.handle, privateBytes, publicBytes))
    return { handle, public: publicBytes, name: nameOf(publicBytes), private: privateBytes }
  }

  async flush(...handles: readonly number[]): Promise<void> {
    for (const handle of handles) await this.subject.tpm.must(flush(handle))
  }
}

export type Scenario = (on: Recorder) => Promise<void>

export const creation = (template: Public, of: { auth?: Uint8Array; data?: Uint8Array; outside?: Uint8Array; pcrs?: Uint8Array } = {}): Uint8Array =>
  concat(sized(concat(sized(of.auth ?? empty), sized(of.data ?? empty))), sized(marshalPublic(template)), sized(of.outside ?? empty), of.pcrs ?? u32(0))

export const createPrimary = (hierarchy: number, template: Public, of: { auth?: Uint8Array; data?: Uint8Array } = {}): Step => ({
  code: command.createPrimary,
  handles: [hierarchy],
  auth: [password()],
  parameters: creation(template, of),
  givesHandle: true,
})
export const create = (parent: number, template: Public, of: { auth?: Uint8Array; data?: Uint8Array } = {}): Step => ({
  code: command.create,
  handles: [parent],
  auth: [password()],
  parameters: creation(template, of),
})
export const load = (parent: number, privateBytes: Uint8Array, publicBytes: Uint8Array): Step => ({
  code: command.load,
  handles: [parent],
  auth: [password()],
  parameters: concat(sized(privateBytes), sized(publicBytes)),
  givesHandle: true,
})
export const flush = (handle: number): Step => ({ code: command.flushContext, parameters: u32(handle) })

export const aes128 = { algorithm: alg.aes, keyBits: 128, mode: alg.cfb }
const { fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, decrypt, sign } = attribute
export const own = fixedTPM | fixedParent | sensitiveDataOrigin | userWithAuth
export const bits = attribute

export const ecc = (attributes: number, of: Partial<EccPublic> = {}): EccPublic => ({
  type: alg.ecc,
  nameAlg: alg.sha256,
  attributes,
  authPolicy: empty,
  symmetric: null,
  scheme: null,
  curve: curve.p256,
  x: empty,
  y: empty,
  ...of,
})
export const keyedHash = (attributes: number, of: Partial<KeyedHashPublic> = {}): KeyedHashPublic => ({
  type: alg.keyedhash,
  nameAlg: alg.sha256,
  attributes,
  authPolicy: empty,
  scheme: null,
  unique: empty,
  ...of,
})
export const ecdsa = { scheme: alg.ecdsa, hash: alg.sha256 } as const
export const hmacScheme = { scheme: alg.hmac, hash: alg.sha256 } as const
export const storage = ecc(own | noDA | restricted | decrypt, { symmetric: aes128 })
export const attestation = ecc(own | noDA | restricted | sign, { scheme: ecdsa })
export const signing = ecc(own | noDA | sign, { scheme: ecdsa })
export const agreement = ecc(own | noDA | decrypt)
export const sealed = keyedHash(fixedTPM | fixedParent | userWithAuth | noDA)
export const macKey = keyedHash(fixedTPM | fixedParent | userWithAuth | noDA | sign, { scheme: hmacScheme })
export const owner = known.owner
export const nullHandle = known.null
export const nullScheme = u16(alg.null)
