import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import { z } from 'zod'
import { AlertSettings } from './alerts.ts'
import type { ProfileName } from './certificate.ts'
import { areConfused, canMeet, nameBy, patternOfHost, readPattern, type NamePattern } from './name-pattern.ts'
import { defaultProfiles, inWords, profileNames, units, type Profile, type Profiles } from './profiles.ts'
import { purposeOf, refusePurpose } from './purposes.ts'
import { RetentionSettings } from './retention.ts'
import { attributeNames, refuseValue, type SubjectAttribute } from './subject.ts'

const lifetime = z
  .string()
  .regex(/^[1-9]\d{0,5}[mhdy]$/, 'not a lifetime such as 48h, 90d or 3y')
  .transform((text) => Number(text.slice(0, -1)) * (units[text.slice(-1)] ?? 0))

const each = (list: readonly string[]): boolean => new Set(list).size === list.length

/** A text that is refused for what `fault` says of it. */
const judged = (fault: (text: string) => string | undefined) =>
  z.string().check((of) => {
    const message = fault(of.value)
    if (message !== undefined) of.issues.push({ code: 'custom', message, input: of.value })
  })

const subject = z
  .strictObject(
    Object.fromEntries(attributeNames.map((name) => [name, judged((text) => refuseValue(name, text)).optional()])) as {
      [N in SubjectAttribute]: z.ZodOptional<z.ZodString>
    },
  )
  .refine((given) => Object.keys(given).length > 0, 'none of C, ST, L, O, OU')

const patternFault = (text: string): string | undefined => {
  const read = readPattern(text)
  return 'fault' in read ? `not ${read.fault}` : undefined
}
const names = z
  .array(judged(patternFault))
  .min(1)
  .max(4)
  .transform((texts) => texts.map(readPattern).filter((read): read is NamePattern => !('fault' in read)))

/** What a configuration may add to an end entity's certificates. */
const additions = (profile: Profile) => ({
  subject: subject.optional(),
  usages: z
    .array(
      judged((text) => {
        if (profile.usages.some((usage) => usage === text)) return `${text} is there already, and stays`
        if (profile.usageBounds.length === 0) return 'no usage can be added to this profile'
        return profile.usageBounds.some((usage) => usage === text) ? undefined : `${text} is none of ${profile.usageBounds.join(', ')}`
      }),
    )
    .min(1)
    .refine(each, 'a usage twice')
    .transform((usages) => profile.usageBounds.filter((usage) => usages.includes(usage)))
    .optional(),
  purposes: z
    .array(
      judged((text) => {
        if (text === profile.eku) return 'its own purpose is there already, and stays'
        const bounds = profile.purposeBounds
        if (bounds === null) return 'no purpose can be added to this profile'
        return purposeOf(text, bounds) === undefined ? refusePurpose(text, bounds) : undefined
      }),
    )
    .min(1)
    .max(8)
    .transform((said) => said.map((text) => purposeOf(text, profile.purposeBounds ?? []) ?? text))
    .refine(each, 'a purpose twice')
    .optional(),
  names: names.refine(() => profile.names === 'device' || profile.names === 'station', 'not to be added: only devices and stations have ids').optional(),
})

const settingsOf = (profile: Profile) => {
  const {
    lifeBounds: [least, most],
    keyBounds,
  } = profile
  const added = additions(profile)
  return z.strictObject({
    lifetime: lifetime.refine((life) => life >= least && life <= most, `outside of ${inWords(least)} to ${inWords(most)}`).optional(),
    keys: z
      .array(z.enum(keyBounds as unknown as [KeyKind, ...KeyKind[]]))
      .min(1)
      .refine(each, 'a kind of key twice')
      .optional(),
    // A CA is what it is.
    ...(profile.ca === null ? added : ({} as typeof added)),
  })
}

/** Names of different devices and stations must not be able to be the same; of one they must not be there twice. */
const confusion = (settings: { readonly [N in ProfileName]?: { readonly names?: readonly NamePattern[] | undefined } | undefined }) => {
  const all = profileNames.flatMap((name) => (settings[name]?.names ?? []).map((pattern, at) => ({ name, pattern, at, of: defaultProfiles[name].names })))
  for (const [index, one] of all.entries())
    for (const other of all.slice(0, index)) {
      if (!canMeet(one.pattern, other.pattern)) continue
      if (one.name === other.name || one.of !== other.of || areConfused(one.pattern, other.pattern)) return { one, other }
    }
  return undefined
}

/** What a configuration may say about each profile, within its bounds; everything else is fixed. */
export const ProfileSettings = z
  .strictObject(
    Object.fromEntries(profileNames.map((name) => [name, settingsOf(defaultProfiles[name]).optional()])) as {
      [N in ProfileName]: z.ZodOptional<ReturnType<typeof settingsOf>>
    },
  )
  .check((of) => {
    const found = confusion(of.value)
    if (found === undefined) return
    const { one, other } = found
    const message = `${one.pattern.kind}:${one.pattern.text} can be the same name as ${other.pattern.kind}:${other.pattern.text} of ${other.name}`
    of.issues.push({ code: 'custom', message, input: of.value, path: [one.name, 'names', one.at] })
  })
export type ProfileSettings = z.infer<typeof ProfileSettings>

/** What the configuration file of a server may hold. */
export const ConfigFile = z.strictObject({ profiles: ProfileSettings.optional(), alerts: AlertSettings.optional(), retention: RetentionSettings.optional() })
export type ConfigFile = z.infer<typeof ConfigFile>

/** Why these settings do not go with this tenant and the host names of this server; undefined when they do. */
export const refuseNames = (settings: ProfileSettings, of: { readonly tenant: string; readonly hosts: readonly string[] }): string | undefined => {
  for (const name of profileNames)
    for (const [at, pattern] of (settings[name]?.names ?? []).entries()) {
      const where = `profiles.${name}.names.${at}: ${pattern.kind}:${pattern.text}`
      if (nameBy(pattern, { tenant: of.tenant, id: 'a' }) === undefined) return `${where}: tenant ${of.tenant} is no label of a host name`
      const host = of.hosts.find((one) => canMeet(pattern, patternOfHost(one)))
      if (host !== undefined) return `${where} can be the name of this server, ${host}`
    }
  return undefined
}

/** The profiles as this server's configuration has them. */
export const profilesOf = (settings: ProfileSettings): Profiles =>
  Object.fromEntries(
    profileNames.map((name): [ProfileName, Profile] => {
      const { life, keys, usages, ...fixed } = defaultProfiles[name]
      const said = settings[name]
      return [
        name,
        {
          ...fixed,
          life: said?.lifetime ?? life,
          keys: said?.keys ?? keys,
          usages: [...usages, ...(said?.usages ?? [])],
          attributes: said?.subject ?? fixed.attributes,
          purposes: said?.purposes ?? fixed.purposes,
          patterns: said?.names ?? fixed.patterns,
        },
      ]
    }),
  ) as Profiles
