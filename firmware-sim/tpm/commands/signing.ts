import { concat, sized } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command as code, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { command, named, objectAt, signerAt, user, type Command } from '../command.ts'
import { multiply, publicPoint, scalarOf, fieldSize } from '../ecc.ts'
import { accepts } from '../entities.ts'
import { has } from '../objects.ts'
import { digestBytes, eccPoint, hashTicket, signature, signatureScheme, sizeOfHash } from '../readers.ts'
import { asParameter, handleFault, parameter, rc } from '../refusal.ts'
import { selectScheme, signDigest, verifyDigest } from '../signing.ts'
import { marshalTicket, nullTicket, ticketDigest } from '../tickets.ts'

/** Keys at work: signatures and key agreement. */
export const signingCommands: readonly (readonly [number, Command])[] = [
  [
    code.sign,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      read: (p) => ({ digest: p.take(digestBytes), asked: p.take(signatureScheme), ticket: p.take(hashTicket) }),
      run(call, { digest, asked, ticket }) {
        const { machine } = call
        const key = signerAt(call, 0)
        if (key === null) throw handleFault(1, rc.key)
        const scheme = selectScheme(key, asked)
        if (scheme === undefined || scheme === null) throw parameter(2, rc.scheme)
        // A restricted key signs only what this TPM has hashed itself and found not to look like its own statements.
        if (ticket.digest.length > 0 || has(key, attribute.restricted)) {
          const expected = ticketDigest.hash(machine, ticket.hierarchy, { hash: scheme.hash, digest })
          if (!sameMac(ticket.digest, expected)) throw parameter(3, rc.ticket)
        } else if (digest.length !== sizeOfHash(scheme.hash)) throw parameter(1, rc.size)
        return { parameters: signDigest(key, scheme, digest, machine.random) }
      },
    }),
  ],
  [
    code.verifySignature,
    command({
      handles: [named(accepts.object)],
      decrypt: true,
      read: (p) => ({ digest: p.take(digestBytes), signed: p.take(signature) }),
      run(call, { digest, signed }) {
        const key = objectAt(call, 0)
        if (!has(key, attribute.sign)) throw handleFault(1, rc.attributes)
        asParameter(2, () => verifyDigest(key, digest, signed))
        if (key.hierarchy === known.null) return { parameters: nullTicket(tag.verified) }
        return { parameters: marshalTicket(tag.verified, key.hierarchy, ticketDigest.verified(call.machine, key.hierarchy, digest, key.name)) }
      },
    }),
  ],
  [
    code.ecdhZGen,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => p.take((input) => input.inner(eccPoint)),
      run(call, point) {
        const key = objectAt(call, 0)
        const area = key.public
        if (area.type !== alg.ecc) throw handleFault(1, rc.key)
        if (has(key, attribute.restricted) || !has(key, attribute.decrypt)) throw handleFault(1, rc.attributes)
        if (area.scheme !== null && area.scheme.scheme !== alg.ecdh) throw handleFault(1, rc.scheme)
        const { sensitive } = key
        if (sensitive === null) throw handleFault(1, rc.key)
        const z = asParameter(1, () => multiply(area.curve, sensitive.secret, point))
        return { parameters: sized(concat(sized(z.x), sized(z.y))) }
      },
    }),
  ],
  [
    code.ecdhKeyGen,
    command({
      handles: [named(accepts.object)],
      encrypt: true,
      read: () => undefined,
      run(call) {
        const area = objectAt(call, 0).public
        if (area.type !== alg.ecc) throw handleFault(1, rc.key)
        const scalar = scalarOf(area.curve, call.machine.random(fieldSize(area.curve) + 16))
        const own = publicPoint(area.curve, scalar)
        const z = multiply(area.curve, scalar, area)
        return { parameters: concat(sized(concat(sized(z.x), sized(z.y))), sized(concat(sized(own.x), sized(own.y)))) }
      },
    }),
  ],
]
