import { createHash } from 'node:crypto'
import { DeviceId, TenantId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { nameText } from '@fleetkey/protocol/x509/agreement.ts'
import { nameAttributes } from '@fleetkey/protocol/x509/name.ts'
import { reasonedRemedy, refuseRequest } from '@fleetkey/protocol/x509/request/reasons.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { readStructure, requestLimits, requestOfFile } from '@fleetkey/protocol/x509/request/structure.ts'
import { readSubject } from '@fleetkey/protocol/x509/request/wishes.ts'
import type { ProfileName } from '@fleetkey/server/ca/certificate.ts'
import { ConfigFile, profilesOf, refuseNames } from '@fleetkey/server/ca/profile-settings.ts'
import { defaultProfiles, namesOf, profileNames, requestPolicyOf, type Profile, type Profiles } from '@fleetkey/server/ca/profiles.ts'
import { subjectOf } from '@fleetkey/server/ca/subject.ts'
import { hostNames } from '@fleetkey/server/ca/tbs.ts'

/** Largest part of a file that is looked at: what is larger is refused for its size. */
export const requestFileMax = 4 * requestLimits.bytes + 1

/** Profiles that somebody else may ask for; the CAs and message keys are the server's own. */
export const requestProfiles: readonly ProfileName[] = profileNames.filter((name) => defaultProfiles[name].names !== null)

export interface RequestQuestion {
  /** The file: DER or PEM. */
  readonly file: Uint8Array
  readonly profile: ProfileName
  readonly profiles: Profiles
  readonly tenant: TenantId
  /** Id of the device or station; the common name of the request unless given. */
  readonly id?: DeviceId
  /** Host names and addresses of a server. */
  readonly hosts: readonly string[]
}

/** What the certificate would be. `subject`: RFC 4514, the common name first; `lifetime`: seconds; `altNames`: `URI:…`, `DNS:…`, `IP:…`. */
export interface WouldIssue {
  readonly subject: string
  readonly altNames: readonly string[]
  readonly keyUsage: readonly string[]
  readonly extKeyUsage: readonly string[]
  readonly ca: boolean
  readonly lifetime: number
  readonly key: { readonly kind: string; readonly spkiSha256: string }
}

export type RequestVerdict =
  | {
      readonly verdict: 'accepted'
      readonly reason: null
      readonly detail: string
      readonly profile: ProfileName
      readonly certificate: WouldIssue
      /** OIDs of what stands in the request and plays no part. */
      readonly ignored: readonly string[]
    }
  | {
      readonly verdict: 'refused'
      readonly reason: string
      readonly detail: string
      readonly profile: ProfileName
      readonly certificate: null
      readonly remedy: string | null
    }

/** The profiles of a configuration file's content; a message for whoever wrote it otherwise. `hosts`: names of the server. */
export const configuredProfiles = (content: unknown, of: { readonly tenant: string; readonly hosts: readonly string[] }): Profiles | string => {
  const parsed = ConfigFile.safeParse(content)
  if (!parsed.success) return parsed.error.issues.map(({ path, message }) => `${path.join('.')}: ${message}`).join('; ')
  const settings = parsed.data.profiles ?? {}
  return refuseNames(settings, of) ?? profilesOf(settings)
}

export const isTenant = (text: string): text is TenantId => TenantId.safeParse(text).success
export const isId = (text: string): text is DeviceId => DeviceId.safeParse(text).success

/** Common name if it can be read: what is wrong with the request is said in the order in which it is judged. */
const commonNameOf = (bytes: Uint8Array): string | null => {
  try {
    return readSubject(readStructure(bytes).subject).commonName
  } catch (error) {
    if (error instanceof Problem) return null
    throw error
  }
}

const accepted = ({ profile: name, profiles, tenant, hosts, ...of }: RequestQuestion): RequestVerdict => {
  const profile: Profile = profiles[name]
  const bytes = requestOfFile(of.file)
  const isServer = profile.names === 'hosts'
  const own = commonNameOf(bytes)
  const id = of.id ?? own?.toLowerCase()
  const names = isServer ? hostNames(hosts) : []
  const { subject: _, ...policy } = requestPolicyOf(profile, { tenant, hosts: names, ...(id === undefined ? {} : { subject: id }) })
  const { spki, kind, ignored } = judgeRequest(bytes, { ...policy, ...(of.id === undefined || isServer ? {} : { subject: of.id }) })
  if (!isServer && (id === undefined || !isId(id))) return refuseRequest('csr.subject.id')
  const subject = isServer ? 'Fleetkey server' : (id ?? '')
  return {
    verdict: 'accepted',
    reason: null,
    detail: 'the key proves itself and nothing is asked for that the profile does not give',
    profile: name,
    certificate: {
      subject: nameText(nameAttributes(subjectOf(profile.attributes, subject))),
      altNames: isServer ? names : namesOf(profile, { tenant, id: subject }),
      keyUsage: profile.usages,
      extKeyUsage: policy.purposes,
      ca: profile.ca !== null,
      lifetime: profile.life / 1000,
      key: { kind, spkiSha256: createHash('sha256').update(spki).digest('hex') },
    },
    ignored,
  }
}

/** Judges a request as the server would, as far as the request shows it. Never throws for what a file holds. */
export const judgeRequestFile = (of: RequestQuestion): RequestVerdict => {
  try {
    return accepted(of)
  } catch (error) {
    if (!(error instanceof Problem) || error.reason === undefined) throw error
    const { reason, message: detail } = error
    return { verdict: 'refused', reason, detail, profile: of.profile, certificate: null, remedy: reasonedRemedy(reason) }
  }
}
