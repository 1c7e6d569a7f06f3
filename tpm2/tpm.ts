import { concat, empty, Reader, sized, TpmFormatError, u16, u32, u8 } from './bytes.ts'
import { alg, attribute, command, handle as known, session as flag, sessionType, tag } from './constants.ts'
import { shareSeed, type Random } from './credential.ts'
import { rc, TpmError, TpmTransportError, type Hierarchy } from './errors.ts'
import { nameOf } from './names.ts'
import { authorisation, decryptParameter, encryptParameter, hashOf, sameMac, sessionKey, type Session } from './session.ts'
import { marshalPcrSelection, marshalPublic, parsePublic, readPcrSelection, type PcrBank, type Public } from './structures.ts'
import type { Transport } from './transport.ts'

/** A loaded object or a permanent entity, with its Name: what command HMACs cover, so that a bus interposer cannot swap handles. */
export interface Entity {
  readonly handle: number
  readonly name: Uint8Array
  /** Authorisation value; everything of ours has an empty one. */
  readonly auth?: Uint8Array
  /** For an object under a policy: a policy session in which that is satisfied. It serves for one command. */
  readonly session?: Session
}

export interface LoadedKey extends Entity {
  /** TPMT_PUBLIC. */
  readonly public: Uint8Array
}

/** A hierarchy or PCR: its Name is its handle. */
export const permanent = (handle: number): Entity => ({ handle, name: u32(handle) })

interface Use {
  readonly session: Session
  readonly attributes: number
  readonly auth: Uint8Array
}

interface Request {
  readonly code: number
  readonly handles: readonly Entity[]
  /** One per handle that needs authorisation, in order; more may follow for encryption. `password`: the empty password. */
  readonly authorise?: readonly (Use | 'password')[]
  readonly parameters?: Uint8Array
  /** Whether the response begins with a handle. */
  readonly givesHandle?: boolean
}

interface Answer {
  readonly handle: number
  readonly parameters: Reader
}

const commandName = (code: number): string => Object.entries(command).find(([, value]) => value === code)?.[0] ?? code.toString(16)
const pause = async (milliseconds: number): Promise<void> => await new Promise((resolve) => void setTimeout(resolve, milliseconds))
/** Commands that the TPM asks to be sent again: for how long, in milliseconds, doubling from 5. */
const usualRetry = 30_000
/** Authorisation value at most (Part 2, TPM2B_AUTH: as long as the longest digest). */
const maxAuth = 64

/** An authorisation value whose bytes are fetched only when they are used. */
export interface AuthValue {
  bytes(): Uint8Array
}

export interface TpmOptions {
  readonly random: Random
  /** Passwords of hierarchies, where their owner has set one. They go into HMACs, never over the bus. */
  readonly passwords?: Readonly<Partial<Record<Hierarchy, AuthValue>>>
  /** How long a command is sent again that the TPM asks to send again, in milliseconds; 30,000 unless said. */
  readonly retryFor?: number
}

/**
 * The TPM 2.0 commands that a device needs (Part 3), over any transport. With `protect` every authorised command goes through one HMAC session that is salted to
 * the endorsement key: responses are checked, first parameters are encrypted both ways (against an interposer on the bus).
 * Errors: TpmError (refused), TpmTransportError (unreachable, or an answer that is not authentic), TpmFormatError (an answer that is not one).
 * Calls are not to overlap: use `exclusive` around everything that belongs together.
 */
export class Tpm {
  readonly #transport: Transport
  readonly #random: Random
  readonly #passwords: NonNullable<TpmOptions['passwords']>
  readonly #retryFor: number
  #turn: Promise<unknown> = Promise.resolve()
  #session: Session | undefined

  constructor(transport: Transport, options: TpmOptions) {
    this.#transport = transport
    this.#random = options.random
    this.#passwords = options.passwords ?? {}
    this.#retryFor = options.retryFor ?? usualRetry
  }

  /** Whether a resource manager stands between: others use the TPM at the same time. */
  get isManaged(): boolean {
    return this.#transport.managed === true
  }

  /** A hierarchy with the password that is known for it. */
  hierarchy(name: Hierarchy): Entity {
    const password = this.#passwords[name]?.bytes() ?? empty
    if (password.length > maxAuth) throw new TpmFormatError(`a password of ${password.length} bytes for the ${name} hierarchy: ${maxAuth} is the most`)
    // Zeros at the end do not count (Part 1 §19.6.5): tools leave them off or pad with them.
    return { ...permanent(known[name]), auth: password.subarray(0, password.findLastIndex((byte) => byte !== 0) + 1) }
  }

  hasPassword(name: Hierarchy): boolean {
    return this.hierarchy(name).auth?.length !== 0
  }

  get random(): Random {
    return this.#random
  }

  /** Runs `work` when everything before it is done: commands of two callers never mix. Not to be nested. */
  async exclusive<R>(work: () => Promise<R>): Promise<R> {
    const turn = this.#turn.then(work, work)
    this.#turn = turn.catch(() => undefined)
    return await turn
  }

  async close(): Promise<void> {
    await this.#transport.close()
  }

  /** Sends until the TPM does not ask for patience any more. */
  async #send(bytes: Uint8Array, { code, handles }: Request): Promise<{ tag: number; body: Reader }> {
    for (let waited = 0, next = 5; ; waited += next, next = Math.min(next * 2, 1000)) {
      const response = new Reader(await this.#transport.send(bytes))
      const [responseTag, size, result] = [response.u16(), response.u32(), response.u32()]
      if (responseTag === tag.version1) throw new TpmTransportError('TPM: it speaks TPM 1.2 only; Fleetkey needs a TPM 2.0')
      if (responseTag !== tag.sessions && responseTag !== tag.noSessions) throw new TpmFormatError(`a response that begins with 0x${responseTag.toString(16)}`)
      if (size !== response.left + 10) throw new TpmFormatError(`a response of ${response.left + 10} bytes that says ${size}`)
      if (result === rc.success) return { tag: responseTag, body: response }
      const patience = result === rc.retry || result === rc.yielded || result === rc.testing || result === rc.nvRate
      if (!patience || waited >= this.#retryFor)
        throw new TpmError(
          result,
          commandName(code),
          handles.map(({ handle }) => handle),
        )
      await pause(next)
    }
  }

  async #execute(request: Request): Promise<Answer> {
    const uses = request.authorise ?? []
    const parameters = this.#encrypted(request, uses)
    const handles = concat(...request.handles.map(({ handle }) => u32(handle)))
    const cpHash = hashOf(u32(request.code), ...request.handles.map(({ name }) => name), parameters)
    const areas = uses.map((use, at) => (use === 'password' ? passwordArea : area(use, cpHash, others(uses, at))))
    const auth = uses.length === 0 ? empty : concat(u32(concat(...areas).length), ...areas)
    const size = 10 + handles.length + auth.length + parameters.length
    const bytes = concat(u16(uses.length === 0 ? tag.noSessions : tag.sessions), u32(size), u32(request.code), handles, auth, parameters)
    const { tag: responseTag, body } = await this.#send(bytes, request)
    const handle = request.givesHandle === true ? body.u32() : 0
    if (uses.length === 0) return { handle, parameters: body }
    if (responseTag !== tag.sessions) throw new TpmTransportError('TPM: a response without its sessions')
    const raw = body.bytes(body.u32())
    const rpHash = hashOf(u32(rc.success), u32(request.code), raw)
    for (const use of uses) this.#check(use, body, rpHash)
    body.end()
    return { handle, parameters: new Reader(decrypted(uses, raw)) }
  }

  /** Fresh nonces for every session, then the first parameter encrypted for the session that says so. */
  #encrypted(request: Request, uses: readonly (Use | 'password')[]): Uint8Array {
    const parameters = request.parameters ?? empty
    for (const use of uses) if (use !== 'password') use.session.nonceCaller = this.#random(32)
    const use = uses.find((one) => one !== 'password' && (one.attributes & flag.decrypt) !== 0)
    if (use === undefined || use === 'password') return parameters
    const reader = new Reader(parameters)
    const first = reader.sized(parameters.length)
    const { key, nonceCaller, nonceTpm } = use.session
    return concat(sized(encryptParameter(key, use.auth, nonceCaller, nonceTpm, first)), reader.rest())
  }

  /** Checks the response's HMAC: an answer that the TPM did not give is not believed. */
  #check(use: Use | 'password', body: Reader, rpHash: Uint8Array): void {
    const [nonce, attributes, mac] = [body.sized(64), body.u8(), body.sized(64)]
    if (use === 'password') return
    const { session, auth } = use
    const expected = authorisation({ omitted: true, key: session.key, auth, hash: rpHash, newer: nonce, older: session.nonceCaller, attributes })
    if (!sameMac(expected, mac)) throw new TpmTransportError('TPM: a response whose HMAC does not verify: it was altered on its way')
    session.nonceTpm = nonce.slice()
  }

  /** Salts the session that protects what follows to this key. */
  async protect(salter: LoadedKey): Promise<void> {
    await this.unprotect()
    this.#session = await this.startSession(sessionType.hmac, salter)
  }

  /** Ends the protecting session. */
  async unprotect(): Promise<void> {
    const open = this.#session
    this.#session = undefined
    if (open !== undefined) await this.flush(open.handle).catch(ignoreRefusal)
  }

  /** Forgets the protecting session without a word to the TPM, which has lost it. */
  forgetSession(): void {
    this.#session = undefined
  }

  get isProtected(): boolean {
    return this.#session !== undefined
  }

  /** The authorisation of an entity with an (empty) value. `directions`: which first parameters are TPM2Bs worth encrypting. */
  #auth(entity: Entity, directions: 'none' | 'in' | 'out' | 'both' = 'none'): Use | 'password' {
    const session = entity.session ?? this.#session
    if (session === undefined) {
      if (entity.auth !== undefined && entity.auth.length > 0) throw new Error('an authorisation value needs a session')
      return 'password'
    }
    const decrypt = directions === 'in' || directions === 'both' ? flag.decrypt : 0
    const encrypt = directions === 'out' || directions === 'both' ? flag.encrypt : 0
    // A policy that does not ask for the authorisation value has no use for it, in HMACs or otherwise (Part 1 §19.6.5).
    return { session, attributes: flag.continue | decrypt | encrypt, auth: entity.session === undefined ? (entity.auth ?? empty) : empty }
  }

  /** TPM2_Startup(CLEAR); a TPM that has started already is fine. */
  async startup(): Promise<void> {
    try {
      await this.#execute({ code: command.startup, handles: [], parameters: u16(0) })
    } catch (error) {
      if (!(error instanceof TpmError && error.code === rc.initialize)) throw error
    }
  }

  async shutdown(): Promise<void> {
    await this.#execute({ code: command.shutdown, handles: [], parameters: u16(0) })
  }

  async selfTest(full: boolean): Promise<void> {
    await this.#execute({ code: command.selfTest, handles: [], parameters: u8(full ? 1 : 0) })
  }

  async getRandom(length: number): Promise<Uint8Array> {
    const { parameters } = await this.#execute({ code: command.getRandom, handles: [], parameters: u16(length) })
    return parameters.sized().slice()
  }

  /** TPM_CAP_HANDLES: handles in use from `first` on. */
  async handles(first: number): Promise<readonly number[]> {
    const { parameters } = await this.#execute({ code: command.getCapability, handles: [], parameters: concat(u32(1), u32(first), u32(254)) })
    parameters.u8()
    if (parameters.u32() !== 1) throw new TpmFormatError('another capability than asked')
    const count = parameters.u32()
    if (count > 254) throw new TpmFormatError(`${count} handles`)
    // Loaded sessions are listed from 0x02000000 on, saved ones from 0x03000000 on, with the handles of HMAC (0x02) and policy sessions (0x03) in either list.
    const kinds = first >>> 24 === 0x02 || first >>> 24 === 0x03 ? [0x02, 0x03] : [first >>> 24]
    return Array.from({ length: count }, () => parameters.u32()).filter((handle) => kinds.includes(handle >>> 24))
  }

  /** TPM2_GetCapability: one page, from `first` on. The rest of it is a list of the capability's kind. */
  async capability(which: number, first: number, count: number): Promise<{ readonly more: boolean; readonly list: Reader }> {
    const { parameters } = await this.#execute({ code: command.getCapability, handles: [], parameters: concat(u32(which), u32(first), u32(count)) })
    const more = parameters.u8() !== 0
    if (parameters.u32() !== which) throw new TpmFormatError('another capability than asked')
    return { more, list: parameters }
  }

  /** TPM_CAP_TPM_PROPERTIES: one property, undefined when the TPM does not have it. */
  async property(id: number): Promise<number | undefined> {
    const { parameters } = await this.#execute({ code: command.getCapability, handles: [], parameters: concat(u32(6), u32(id), u32(1)) })
    parameters.u8()
    parameters.u32()
    return parameters.u32() === 1 && parameters.u32() === id ? parameters.u32() : undefined
  }

  #permanent(handle: number): Entity {
    if (handle === known.owner) return this.hierarchy('owner')
    return handle === known.endorsement ? this.hierarchy('endorsement') : permanent(handle)
  }

  async createPrimary(hierarchy: number, template: Public): Promise<LoadedKey> {
    const entity = this.#permanent(hierarchy)
    const { handle, parameters } = await this.#execute({
      code: command.createPrimary,
      handles: [entity],
      authorise: [this.#auth(entity, 'in')],
      parameters: concat(sized(noSensitive), sized(marshalPublic(template)), sized(empty), u32(0)),
      givesHandle: true,
    })
    const publicBytes = parameters.sized().slice()
    return { handle, public: publicBytes, name: nameOf(publicBytes) }
  }

  /** A child of `parent`. `data`: what a sealed object holds. Private: content of TPM2B_PRIVATE. */
  async create(parent: Entity, template: Public, data: Uint8Array = empty): Promise<{ public: Uint8Array; private: Uint8Array }> {
    const { parameters } = await this.#execute({
      code: command.create,
      handles: [parent],
      authorise: [this.#auth(parent, 'in')],
      parameters: concat(sized(concat(sized(empty), sized(data))), sized(marshalPublic(template)), sized(empty), u32(0)),
    })
    const privateBytes = parameters.sized().slice()
    return { private: privateBytes, public: parameters.sized().slice() }
  }

  async load(parent: Entity, blob: { public: Uint8Array; private: Uint8Array }): Promise<LoadedKey> {
    const { handle } = await this.#execute({
      code: command.load,
      handles: [parent],
      authorise: [this.#auth(parent)],
      parameters: concat(sized(blob.private), sized(blob.public)),
      givesHandle: true,
    })
    return { handle, public: blob.public, name: nameOf(blob.public) }
  }

  async readPublic(handle: number): Promise<LoadedKey> {
    const { parameters } = await this.#execute({ code: command.readPublic, handles: [{ handle, name: empty }] })
    const publicBytes = parameters.sized().slice()
    return { handle, public: publicBytes, name: nameOf(publicBytes) }
  }

  async flush(handle: number): Promise<void> {
    await this.#execute({ code: command.flushContext, handles: [], parameters: u32(handle) })
  }

  /** TPM2_StartAuthSession: salted to a key (null: unsalted), AES-128-CFB for parameters, SHA-256. */
  async startSession(type: number, salter: LoadedKey | null): Promise<Session> {
    const nonceCaller = this.#random(32)
    const { seed: salt, secret } = salter === null ? { seed: empty, secret: empty } : shareSeed(salter.public, 'SECRET', this.#random)
    const { handle, parameters } = await this.#execute({
      code: command.startAuthSession,
      handles: [salter ?? permanent(known.null), permanent(known.null)],
      parameters: concat(sized(nonceCaller), sized(secret), u8(type), u16(alg.aes), u16(128), u16(alg.cfb), u16(alg.sha256)),
      givesHandle: true,
    })
    const nonceTpm = parameters.sized().slice()
    return { handle, key: sessionKey(salt, nonceTpm, nonceCaller), nonceTpm, nonceCaller }
  }

  /** A policy session in which the endorsement hierarchy has authorised: what an EK's policy asks. Flush it. */
  async #endorsementPolicy(): Promise<Session> {
    const policy = await this.startSession(sessionType.policy, null)
    try {
      const endorsement = this.hierarchy('endorsement')
      await this.#execute({
        code: command.policySecret,
        handles: [endorsement, permanent(policy.handle)],
        authorise: [this.#auth(endorsement)],
        parameters: concat(sized(empty), sized(empty), sized(empty), u32(0)),
      })
      return policy
    } catch (error) {
      await this.flush(policy.handle).catch(ignoreRefusal)
      throw error
    }
  }

  /** TPM2_ActivateCredential with the EK's policy. The secret, at most 32 bytes. */
  async activateCredential(ak: Entity, ek: LoadedKey, credential: { blob: Uint8Array; secret: Uint8Array }): Promise<Uint8Array> {
    // An EK of the high range takes its (empty) authorisation value too, whatever hash its policy has.
    if ((parsePublic(ek.public).attributes & attribute.userWithAuth) !== 0) {
      const { parameters } = await this.#execute({
        code: command.activateCredential,
        handles: [ak, ek],
        authorise: [this.#auth(ak, 'both'), this.#second(ek)],
        parameters: concat(sized(credential.blob), sized(credential.secret)),
      })
      return parameters.sized(64).slice()
    }
    const policy = await this.#endorsementPolicy()
    try {
      const { parameters } = await this.#execute({
        code: command.activateCredential,
        handles: [ak, ek],
        authorise: [this.#auth(ak, 'both'), { session: policy, attributes: 0, auth: empty }],
        parameters: concat(sized(credential.blob), sized(credential.secret)),
      })
      return parameters.sized(64).slice()
    } catch (error) {
      // A refused command leaves the policy session in the TPM; after success it is gone.
      await this.flush(policy.handle).catch(ignoreRefusal)
      throw error
    }
  }

  async quote(ak: Entity, banks: readonly PcrBank[], qualifyingData: Uint8Array): Promise<{ attest: Uint8Array; signature: Uint8Array }> {
    const { parameters } = await this.#execute({
      code: command.quote,
      handles: [ak],
      authorise: [this.#auth(ak)],
      parameters: concat(sized(qualifyingData), u16(alg.null), marshalPcrSelection(banks)),
    })
    const attest = parameters.sized().slice()
    return { attest, signature: parameters.rest().slice() }
  }

  async certify(object: Entity, ak: Entity, qualifyingData: Uint8Array): Promise<{ attest: Uint8Array; signature: Uint8Array }> {
    const { parameters } = await this.#execute({
      code: command.certify,
      handles: [object, ak],
      authorise: [this.#auth(object), this.#second(ak)],
      parameters: concat(sized(qualifyingData), u16(alg.null)),
    })
    const attest = parameters.sized().slice()
    return { attest, signature: parameters.rest().slice() }
  }

  /** One session cannot authorise twice in a command: the second key, which has an empty value, goes by password. */
  #second(_entity: Entity): 'password' {
    return 'password'
  }

  /** TPM2_Sign of a SHA-256 digest by an unrestricted key with its own scheme. TPMT_SIGNATURE. */
  async sign(key: Entity, digest: Uint8Array): Promise<Uint8Array> {
    const ticket = concat(u16(tag.hashcheck), u32(known.null), sized(empty))
    const { parameters } = await this.#execute({
      code: command.sign,
      handles: [key],
      authorise: [this.#auth(key)],
      parameters: concat(sized(digest), u16(alg.null), ticket),
    })
    return parameters.rest().slice()
  }

  /** TPM2_ECDH_ZGen: x coordinate of the product, 32 bytes. `x`, `y`: 32 bytes each. */
  async ecdhZGen(key: Entity, x: Uint8Array, y: Uint8Array): Promise<Uint8Array> {
    const { parameters } = await this.#execute({
      code: command.ecdhZGen,
      handles: [key],
      authorise: [this.#auth(key, 'both')],
      parameters: sized(concat(sized(x), sized(y))),
    })
    const point = new Reader(parameters.sized())
    const z = point.sized(32)
    return concat(new Uint8Array(32 - z.length), z)
  }

  /** TPM2_Import with an AES-128 inner wrapper. Content of TPM2B_PRIVATE, loadable below `parent`. */
  async import(parent: Entity, of: { public: Uint8Array; duplicate: Uint8Array; seed: Uint8Array; innerKey: Uint8Array }): Promise<Uint8Array> {
    const { parameters } = await this.#execute({
      code: command.import,
      handles: [parent],
      authorise: [this.#auth(parent, 'in')],
      parameters: concat(sized(of.innerKey), sized(of.public), sized(of.duplicate), sized(of.seed), u16(alg.aes), u16(128), u16(alg.cfb)),
    })
    return parameters.sized().slice()
  }

  /** HMAC-SHA256 under a key in the TPM. Longer data than one buffer goes through a sequence. */
  async hmac(key: Entity, data: Uint8Array): Promise<Uint8Array> {
    const buffer = 1024
    if (data.length <= buffer) {
      const { parameters } = await this.#execute({
        code: command.hmac,
        handles: [key],
        authorise: [this.#auth(key, 'in')],
        parameters: concat(sized(data), u16(alg.null)),
      })
      return parameters.sized(64).slice()
    }
    const { handle } = await this.#execute({
      code: command.hmacStart,
      handles: [key],
      authorise: [this.#auth(key)],
      parameters: concat(sized(empty), u16(alg.null)),
      givesHandle: true,
    })
    // A sequence object has the empty Name.
    const sequence: Entity = { handle, name: empty }
    try {
      let at = 0
      for (; at + buffer < data.length; at += buffer)
        await this.#execute({
          code: command.sequenceUpdate,
          handles: [sequence],
          authorise: [this.#auth(sequence, 'in')],
          parameters: sized(data.subarray(at, at + buffer)),
        })
      const { parameters } = await this.#execute({
        code: command.sequenceComplete,
        handles: [sequence],
        authorise: [this.#auth(sequence, 'in')],
        parameters: concat(sized(data.subarray(at)), u32(known.null)),
      })
      return parameters.sized(64).slice()
    } catch (error) {
      await this.flush(handle).catch(ignoreRefusal)
      throw error
    }
  }

  /** TPM2_Unseal: what a sealed object holds, encrypted on its way. */
  async unseal(object: Entity): Promise<Uint8Array> {
    const { parameters } = await this.#execute({ code: command.unseal, handles: [object], authorise: [this.#auth(object, 'out')] })
    return parameters.sized(128).slice()
  }

  /** TPM2_LoadExternal of a public area alone. In the owner hierarchy: tickets of the null hierarchy are worth nothing. */
  async loadExternal(publicBytes: Uint8Array): Promise<LoadedKey> {
    const { handle } = await this.#execute({
      code: command.loadExternal,
      handles: [],
      parameters: concat(sized(empty), sized(publicBytes), u32(known.owner)),
      givesHandle: true,
    })
    return { handle, public: publicBytes, name: nameOf(publicBytes) }
  }

  /** TPM2_VerifySignature of a digest by a TPMT_SIGNATURE: the ticket (TPMT_TK_VERIFIED), which only this TPM makes and takes. */
  async verifySignature(key: Entity, digest: Uint8Array, signature: Uint8Array): Promise<Uint8Array> {
    const { parameters } = await this.#execute({ code: command.verifySignature, handles: [key], parameters: concat(sized(digest), signature) })
    return parameters.rest().slice()
  }

  /** TPM2_PolicyPCR with the values that the PCRs have now. */
  async policyPcr(session: Session, banks: readonly PcrBank[]): Promise<void> {
    const parameters = concat(sized(empty), marshalPcrSelection(banks))
    await this.#execute({ code: command.policyPcr, handles: [permanent(session.handle)], parameters })
  }

  /** TPM2_PolicyAuthorize: what the session shows so far is `approved`, and the owner of that Name has said that it is good for `ref`. */
  async policyAuthorize(session: Session, of: { approved: Uint8Array; ref: Uint8Array; signer: Uint8Array; ticket: Uint8Array }): Promise<void> {
    const parameters = concat(sized(of.approved), sized(of.ref), sized(of.signer), of.ticket)
    await this.#execute({ code: command.policyAuthorize, handles: [permanent(session.handle)], parameters })
  }

  /** Size, attributes (TPMA_NV) and Name of an NV index; undefined when there is none. */
  async nvSize(index: number): Promise<{ size: number; attributes: number; name: Uint8Array } | undefined> {
    try {
      const { parameters } = await this.#execute({ code: command.nvReadPublic, handles: [{ handle: index, name: empty }] })
      const area = new Reader(parameters.sized())
      area.bytes(4 + 2)
      const attributes = area.u32()
      area.sized(64)
      return { attributes, size: area.u16(), name: parameters.sized(68).slice() }
    } catch (error) {
      if (error instanceof TpmError && error.is(rc.handle)) return undefined
      throw error
    }
  }

  /** An NV index that anybody or the owner may read, in pieces that the TPM has a buffer for; undefined when there is none. */
  async nvRead(index: number): Promise<Uint8Array | undefined> {
    const found = await this.nvSize(index)
    if (found === undefined) return undefined
    const area = { handle: index, name: found.name }
    // By its own (empty) value where that is allowed: an EK certificate is for everybody, also where the owner has set a password.
    const reader = (found.attributes & nvByAnybody) === nvByAnybody ? area : this.hierarchy('owner')
    const piece = Math.min(512, (await this.property(nvBufferMax)) || 512)
    const parts: Uint8Array[] = []
    for (let at = 0; at < found.size; at += piece) {
      const { parameters } = await this.#execute({
        code: command.nvRead,
        handles: [reader, area],
        authorise: [this.#auth(reader)],
        parameters: concat(u16(Math.min(piece, found.size - at)), u16(at)),
      })
      parts.push(parameters.sized().slice())
    }
    return concat(...parts)
  }

  /** Defines an NV index that owner and platform may read and the owner may write (as factories do for EK certificates), and writes it. */
  async nvStore(index: number, bytes: Uint8Array): Promise<void> {
    const owner = this.hierarchy('owner')
    // TPMA_NV: OWNERWRITE, AUTHWRITE, PPREAD, OWNERREAD, AUTHREAD, NO_DA.
    const area = concat(u32(index), u16(alg.sha256), u32(0x0207_0006 & ~0x4), sized(empty), u16(bytes.length))
    await this.#execute({ code: command.nvDefineSpace, handles: [owner], authorise: [this.#auth(owner)], parameters: concat(sized(empty), sized(area)) })
    for (let at = 0; at < bytes.length; at += 512) {
      // The Name changes with the first write, which sets the WRITTEN attribute.
      const found = await this.nvSize(index)
      if (found === undefined) throw new TpmFormatError('an NV index that is not there after it was defined')
      await this.#execute({
        code: command.nvWrite,
        handles: [owner, { handle: index, name: found.name }],
        authorise: [this.#auth(owner)],
        parameters: concat(sized(bytes.subarray(at, at + 512)), u16(at)),
      })
    }
  }

  /** Values of one bank, eight PCRs a call at most, until everything asked was read at one update count. */
  async pcrRead(hash: number, pcrs: readonly number[]): Promise<ReadonlyMap<number, Uint8Array>> {
    for (let attempt = 0; attempt < 8; attempt++) {
      const values = new Map<number, Uint8Array>()
      const counters = new Set<number>()
      while (values.size < pcrs.length) {
        const missing = pcrs.filter((pcr) => !values.has(pcr))
        const { parameters } = await this.#execute({ code: command.pcrRead, handles: [], parameters: marshalPcrSelection([{ hash, pcrs: missing }]) })
        counters.add(parameters.u32())
        const read = readPcrSelection(parameters)[0]?.pcrs ?? []
        const count = parameters.u32()
        if (count !== read.length || count === 0) throw new TpmFormatError(`${count} PCR values for ${read.length} PCRs`)
        for (const pcr of read) values.set(pcr, parameters.sized(64).slice())
      }
      // Of none, as where nothing is approved any more, there is nothing that could have changed.
      if (counters.size <= 1) return values
    }
    throw new TpmFormatError('PCRs keep changing while they are read')
  }

  async pcrExtend(pcr: number, digests: readonly { readonly hash: number; readonly digest: Uint8Array }[]): Promise<void> {
    const entity = permanent(pcr)
    await this.#execute({
      code: command.pcrExtend,
      handles: [entity],
      authorise: ['password'],
      parameters: concat(u32(digests.length), ...digests.map(({ hash, digest }) => concat(u16(hash), digest))),
    })
  }

  /** TPM2_ReadClock: what quotes also carry, unsigned. */
  async readClock(): Promise<{ resetCount: number; restartCount: number; clock: bigint; safe: boolean }> {
    const { parameters } = await this.#execute({ code: command.readClock, handles: [] })
    parameters.u64()
    return { clock: parameters.u64(), resetCount: parameters.u32(), restartCount: parameters.u32(), safe: parameters.u8() === 1 }
  }

  /** TPM2_DictionaryAttackLockReset by lockout authorisation: forgets the failed attempts. */
  async resetLockout(): Promise<void> {
    const lockout = this.hierarchy('lockout')
    await this.#execute({ code: command.dictionaryAttackLockReset, handles: [lockout], authorise: [this.#auth(lockout)] })
  }

  /** TPM2_Clear by lockout authorisation: a new owner hierarchy; everything below it is gone. */
  async clear(): Promise<void> {
    const lockout = this.hierarchy('lockout')
    await this.#execute({ code: command.clear, handles: [lockout], authorise: [this.#auth(lockout)] })
  }
}

/** TPM_PT_NV_BUFFER_MAX. */
const nvBufferMax = 0x12c
/** TPMA_NV AUTHREAD and NO_DA: read by the index's own value, and a failure counts for nothing. */
const nvByAnybody = 0x0204_0000
/** TPMS_SENSITIVE_CREATE without auth value and data. */
const noSensitive = concat(sized(empty), sized(empty))
const passwordArea = concat(u32(known.password), sized(empty), u8(flag.continue), sized(empty))

const area = (use: Use, cpHash: Uint8Array, others: readonly Uint8Array[]): Uint8Array => {
  const { session, auth, attributes } = use
  const mac = authorisation({
    omitted: true,
    key: session.key,
    auth,
    hash: cpHash,
    newer: session.nonceCaller,
    older: session.nonceTpm,
    others,
    attributes,
  })
  return concat(u32(session.handle), sized(session.nonceCaller), u8(attributes), sized(mac))
}

/** The first session's HMAC also covers the nonces of other sessions that encrypt (Part 1 §19.6.5). */
const others = (uses: readonly (Use | 'password')[], at: number): readonly Uint8Array[] => {
  if (at !== 0) return []
  const of = (bit: number): Use | undefined => uses.find((use): use is Use => use !== 'password' && (use.attributes & bit) !== 0)
  const [first] = uses
  const [decrypting, encrypting] = [of(flag.decrypt), of(flag.encrypt)]
  return [
    ...(decrypting !== undefined && decrypting !== first ? [decrypting.session.nonceTpm] : []),
    ...(encrypting !== undefined && encrypting !== first && encrypting !== decrypting ? [encrypting.session.nonceTpm] : []),
  ]
}

/** The response's first parameter in clear. */
const decrypted = (uses: readonly (Use | 'password')[], raw: Uint8Array): Uint8Array => {
  const use = uses.find((one): one is Use => one !== 'password' && (one.attributes & flag.encrypt) !== 0)
  if (use === undefined) return raw
  const reader = new Reader(raw)
  const first = reader.sized(raw.length)
  const { key, nonceTpm, nonceCaller } = use.session
  return concat(sized(decryptParameter(key, use.auth, nonceTpm, nonceCaller, first)), reader.rest())
}

/** Cleaning up must not hide why there was something to clean. */
const ignoreRefusal = (error: unknown): void => {
  if (!(error instanceof TpmError)) throw error
}
