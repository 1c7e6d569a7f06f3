import { concat, empty, sized, u16, u32, u64, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command as code, generated, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { digest, kdfA } from '@fleetkey/tpm2/kdf.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { marshalPcrSelection, type Scheme } from '@fleetkey/tpm2/structures.ts'
import { admin, command, named, nvAt, objectAt, signerAt, user, type Answer, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import type { Machine } from '../machine.ts'
import { nvName } from '../nv.ts'
import type { TpmObject } from '../objects.ts'
import { present } from '../pcrs.ts'
import { creationTicket, dataBytes, digestBytes, pcrSelection, signatureScheme, u16 as readU16 } from '../readers.ts'
import { parameter, rc, Refusal } from '../refusal.ts'
import { selectScheme, signDigest } from '../signing.ts'
import { obfuscationProof, ticketDigest } from '../tickets.ts'
import { checkNvRead } from './nv.ts'

/** Version of the simulator, as a quote tells it. */
const firmwareVersion = 0x0001_0000_0000_0001n

const clockBytes = (machine: Machine, of: { resetCount: number; restartCount: number }): Uint8Array => {
  const { clock, safe } = machine.clock()
  return concat(u64(clock), u32(of.resetCount), u32(of.restartCount), u8(safe ? 1 : 0))
}

/** TPMS_ATTEST up to what is attested. Outside the endorsement and platform hierarchies counters and version are obfuscated (Part 1 §36.7). */
const head = (machine: Machine, key: TpmObject | null, of: { type: number; extra: Uint8Array }): Uint8Array => {
  const { resetCount, restartCount } = machine.clock()
  const signer = key?.qualifiedName ?? u32(known.null)
  const plain = key?.hierarchy === known.endorsement || key?.hierarchy === known.platform
  const mask = Buffer.from(plain ? new Uint8Array(16) : kdfA(alg.sha256, obfuscationProof(machine), 'OBFUSCATE', signer, empty, 128))
  const counters = { resetCount: (resetCount + mask.readUInt32BE(8)) >>> 0, restartCount: (restartCount + mask.readUInt32BE(12)) >>> 0 }
  const version = BigInt.asUintN(64, firmwareVersion + mask.readBigUInt64BE(0))
  return concat(u32(generated), u16(of.type), sized(signer), sized(of.extra), clockBytes(machine, counters), u64(version))
}

/** TPMS_ATTEST and its signature; without a key an empty one. */
const signed = (call: Call, key: TpmObject | null, scheme: Scheme | null, attest: Uint8Array): Answer => {
  if (key === null || scheme === null) return { parameters: concat(sized(attest), u16(alg.null)) }
  const signature = signDigest(key, scheme, digest(scheme.hash, attest), call.machine.random)
  call.machine.disorder()
  return { parameters: concat(sized(attest), signature) }
}

/** Signing key and scheme of an attestation; `number`: of the scheme's parameter. */
const signerOf = (call: Call, at: number, asked: Scheme | null, number: number): { key: TpmObject | null; scheme: Scheme | null } => {
  const key = signerAt(call, at)
  const scheme = selectScheme(key, asked)
  if (scheme === undefined) throw parameter(number, rc.scheme)
  return { key, scheme }
}

const withData = { decrypt: true, encrypt: true } as const

export const attestationCommands: readonly (readonly [number, Command])[] = [
  [
    code.quote,
    command({
      handles: [user(accepts.objectOrNull)],
      ...withData,
      read: (p) => ({ extra: p.take(dataBytes), asked: p.take(signatureScheme), banks: p.take(pcrSelection) }),
      run(call, { extra, asked, banks }) {
        const { key, scheme } = signerOf(call, 0, asked, 2)
        if (scheme === null) throw parameter(2, rc.scheme)
        const quoted = concat(marshalPcrSelection(present(banks)), sized(call.machine.pcrs.digestOf(scheme.hash, banks)))
        return signed(call, key, scheme, concat(head(call.machine, key, { type: tag.attestQuote, extra }), quoted))
      },
    }),
  ],
  [
    code.certify,
    command({
      handles: [admin(accepts.object), user(accepts.objectOrNull)],
      ...withData,
      read: (p) => ({ extra: p.take(dataBytes), asked: p.take(signatureScheme) }),
      run(call, { extra, asked }) {
        const { key, scheme } = signerOf(call, 1, asked, 2)
        const object = objectAt(call, 0)
        const attest = concat(head(call.machine, key, { type: tag.attestCertify, extra }), sized(object.name), sized(object.qualifiedName))
        return signed(call, key, scheme, attest)
      },
    }),
  ],
  [
    code.certifyCreation,
    command({
      handles: [user(accepts.objectOrNull), named(accepts.object)],
      ...withData,
      read: (p) => ({ extra: p.take(dataBytes), creationHash: p.take(digestBytes), asked: p.take(signatureScheme), ticket: p.take(creationTicket) }),
      run(call, { extra, creationHash, asked, ticket }) {
        const { key, scheme } = signerOf(call, 0, asked, 3)
        const { name } = objectAt(call, 1)
        if (!sameMac(ticket.digest, ticketDigest.creation(call.machine, ticket.hierarchy, name, creationHash))) throw parameter(4, rc.ticket)
        return signed(call, key, scheme, concat(head(call.machine, key, { type: tag.attestCreation, extra }), sized(name), sized(creationHash)))
      },
    }),
  ],
  [
    code.getTime,
    command({
      handles: [user(accepts.endorsement), user(accepts.objectOrNull)],
      ...withData,
      read: (p) => ({ extra: p.take(dataBytes), asked: p.take(signatureScheme) }),
      run(call, { extra, asked }) {
        const { machine } = call
        const { key, scheme } = signerOf(call, 1, asked, 2)
        const time = concat(u64(BigInt(machine.time)), clockBytes(machine, machine.clock()), u64(firmwareVersion))
        return signed(call, key, scheme, concat(head(machine, key, { type: tag.attestTime, extra }), time))
      },
    }),
  ],
  [
    code.nvCertify,
    command({
      handles: [user(accepts.objectOrNull), user(accepts.nvAuth), named(accepts.nvIndex)],
      ...withData,
      read: (p) => ({ extra: p.take(dataBytes), asked: p.take(signatureScheme), size: p.take(readU16), offset: p.take(readU16) }),
      run(call, { extra, asked, size, offset }) {
        const { key, scheme } = signerOf(call, 0, asked, 2)
        const index = nvAt(call, 2)
        checkNvRead(call, 1, index)
        if (size + offset > index.data.length) throw new Refusal(rc.nvRange)
        if (size > 1024) throw parameter(3, rc.value)
        const whole = size === 0 && offset === 0
        const hashed = (): Uint8Array => (scheme === null ? empty : digest(scheme.hash, index.data))
        const content = whole ? sized(hashed()) : concat(u16(offset), sized(index.data.subarray(offset, offset + size)))
        const type = whole ? tag.attestNvDigest : tag.attestNv
        return signed(call, key, scheme, concat(head(call.machine, key, { type, extra }), sized(nvName(index)), content))
      },
    }),
  ],
]
