import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { fromPem } from '@fleetkey/protocol/x509/pem.ts'
import { keyUsages } from '@fleetkey/protocol/x509/oids.ts'
import type { Caller } from '../access/caller.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'

/**
 * Trusts a CA (PEM) that vouches for EKs. `test` admits a simulator's: what it vouches for is `simulated`, which every report says.
 * The id is the certificate's SHA-256. Throws Problem: `malformed` unless it is one CA certificate, `conflict` when it is trusted already.
 */
export const importEndorsement = async (ctx: Context, caller: Caller, input: { certificate: string; test: boolean }): Promise<{ id: string }> => {
  const id = await perform(ctx, { caller, action: 'endorsement.import', subject: 'endorsement' }, async (tx) => {
    const [der, more] = fromPem('CERTIFICATE', input.certificate)
    if (der === undefined || more !== undefined) throw new Problem('malformed', 'one certificate at a time')
    const certificate = parseCertificate(der)
    if (certificate.basicConstraints?.ca !== true || certificate.keyUsage?.has(keyUsages.keyCertSign) !== true)
      throw new Problem('malformed', 'not the certificate of a CA', { reason: 'endorsement.not-a-ca' })
    const id = certificate.fingerprint
    if ((await ctx.store.get('endorsement', id)) !== undefined) throw new Problem('conflict', `endorsement ${id} is trusted already`)
    const subject = certificate.native.subject.replaceAll('\n', ', ').slice(0, 200)
    tx.insert('endorsement', { id, certificate: der, subject, test: input.test, importedAt: ctx.now() })
    tx.note(`${subject}${input.test ? ': TEST, admits simulated devices' : ''}`)
    return id
  })
  ctx.step('endorsement.import')
  return { id }
}
